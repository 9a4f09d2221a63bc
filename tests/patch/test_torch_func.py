"""`torch.func`: gradients and images one by one are those of the usual way, or one sentence."""

import pytest
import torch
from torch.func import functional_call, grad, jvp, vmap

import patch
from tests.families import FAMILIES
from tests.helpers import RAGGED, STATIC_OPTIONS, by_speed, different_images

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
NAMES = ["vit", "Dinov2"]


def parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


CASES = [(name, method) for name in NAMES for method in FAMILIES[name].methods]
QUICK = [("vit", "graph"), ("vit", "mpm"), ("vit", "pitome"), ("Dinov2", "tome")]
STATIC = [case for case in QUICK if case[1] != "mpm"]


@pytest.mark.parametrize(("name", "method"), by_speed(CASES, QUICK))
def test_gradients(name, method):
    family, images = FAMILIES[name], different_images()
    for options in ({}, STATIC_OPTIONS.get(method, {})):
        model = family.patched(method, **options)
        check_gradients(model, lambda model: result(model(images)).square().mean())


def result(output):
    return getattr(output, "last_hidden_state", output)


def check_gradients(model, loss):
    """By `torch.func` as by `backward`."""
    found = grad(lambda values: loss(partial_call(model, values)))(parameters(model))
    loss(model).backward()
    for key, parameter in model.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found[key], expected, **CLOSE, msg=key)


def partial_call(model, values):
    """The model with other parameters, as a function."""
    return lambda *args: functional_call(model, values, args)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
@pytest.mark.parametrize(("name", "method"), by_speed([case for case in CASES if case[1] in STATIC_OPTIONS], STATIC))
def test_images_one_by_one(name, method):
    family, images = FAMILIES[name], different_images()
    model = family.patched(method, **STATIC_OPTIONS[method], attention="proportional")
    found = vmap(lambda image: family.run(model, image[None])[0], randomness="same")(images)
    torch.testing.assert_close(found, family.run(model, images), **CLOSE)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@torch.no_grad()
def test_numbers_of_tokens_that_depend_on_the_image_are_refused():
    """Images of one batch would have different shapes."""
    family, images = FAMILIES["vit"], different_images()
    for method in RAGGED:
        model = family.patched(method)
        with pytest.raises(ValueError, match=r"vmap .*tokens=") as caught:
            vmap(lambda image, m=model: m(image[None])[0])(images)
        assert "\n" not in str(caught.value)
        assert model(images).isfinite().all()


@pytest.mark.parametrize("method", ["ltmp", "diffrate"])
def test_learned_values(method):
    family, images = FAMILIES["vit"], different_images()
    model = patch.apply(patch.add_modules(family.build(), method), method, learned=True)
    for training in (False, True):
        model.train(training).zero_grad()
        check_gradients(model, lambda model: model(images).square().mean())


@torch.no_grad()
def test_directional_derivatives():
    family, images = FAMILIES["vit"], different_images().double()
    change = torch.randn_like(images)
    for method in ("graph", "mpm"):
        model = family.patched(method).double()
        for block in model.blocks:
            block.attn.fused_attn = False  # which has no forward derivative
        _, found = jvp(model, (images,), (change,))
        expected = (model(images + 1e-7 * change) - model(images - 1e-7 * change)) / 2e-7
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4, msg=method)
