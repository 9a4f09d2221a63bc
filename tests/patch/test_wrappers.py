"""Models in wrappers: patched through the wrapper they are what the patched model is alone."""

import copy

import pytest
import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import patch
from tests.families import FAMILIES, MASKS, segmenter
from tests.helpers import by_speed, different_images

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def group():
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


def used_compiled(model):
    """Compiled, and in use before it is patched."""
    model = torch.compile(model, backend="eager")
    with torch.inference_mode():
        model(different_images(3))
    return model


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "compile": compiled,
    "used compile": used_compiled,
    "AveragedModel": AveragedModel,
    "Sequential": nn.Sequential,
    "Sequential of more": lambda model: nn.Sequential(nn.Identity(), model, nn.Identity()),
    "two wrappers": lambda model: nn.DataParallel(compiled(model)),
}
SETTINGS = [[("graph", {"threshold": 0.2}), ("tome", {"r": 2})], [("graph", {"tokens": 7})]]  # compiled: one graph
INNER = {"Sequential": "0", "Sequential of more": "1", "two wrappers": "module._orig_mod"}
MODELS = {
    "vit": FAMILIES["vit"].build,
    "segmenter": segmenter,
    "mask transformer": lambda: segmenter(**MASKS),
}


def is_compiled(wrapper):
    return "compile" in wrapper or wrapper == "two wrappers"


def cases(slow):
    """(model, wrapper); compilers take seconds."""
    pairs = [(model, wrapper) for model in MODELS for wrapper in WRAPPERS]
    quick = [(model, wrapper) for model, wrapper in pairs if not is_compiled(wrapper) and model != "segmenter"]
    return by_speed(pairs, quick, slow)


def inner(wrapped, wrapper):
    """The model in a wrapper."""
    name = INNER.get(wrapper, "_orig_mod" if "compile" in wrapper else "module")
    return wrapped.get_submodule(name)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@torch.inference_mode()
@pytest.mark.parametrize(("model", "wrapper"), cases(slow=[("mask transformer", "used compile"), ("vit", "compile")]))
def test_a_model_is_patched_through_its_wrapper(model, wrapper):
    images = different_images(3)
    for method, options in SETTINGS[is_compiled(wrapper)]:
        plain, alone = MODELS[model](), patch.apply(MODELS[model](), method, **options)
        expected, unmerged = alone(images), plain(images)
        assert not torch.allclose(expected, unmerged, atol=1e-3)
        wrapped = WRAPPERS[wrapper](plain).eval()
        classes = [type(m) for m in wrapped.modules()]
        assert patch.apply(wrapped, method, **options) is wrapped
        torch.testing.assert_close(wrapped(images), expected, **CLOSE)
        for one in (wrapped, inner(wrapped, wrapper)):
            assert patch.is_patched(one) and patch.method(one) == method
            assert patch.reduction(one).lengths == patch.reduction(alone).lengths
            assert patch.reductions(one).keys() == patch.reductions(alone).keys()
            assert patch.options(one) == patch.options(alone) and patch.loss(one) == 0
        with pytest.raises(ValueError, match=r"patch\.remove"):
            patch.apply(wrapped, method)
        with pytest.raises(ValueError, match=r"patch\.remove"):
            patch.apply(inner(wrapped, wrapper), method)
        assert patch.remove(wrapped) is wrapped
        assert [type(m) for m in wrapped.modules()] == classes
        assert not patch.is_patched(wrapped) and not patch.is_patched(inner(wrapped, wrapper))
        torch.testing.assert_close(wrapped(images), unmerged, **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize(("model", "wrapper"), cases(slow=[("segmenter", "two wrappers")]))
def test_a_patched_model_is_wrapped(model, wrapper):
    images = different_images(3)
    for method, options in SETTINGS[is_compiled(wrapper)]:
        alone, plain = patch.apply(MODELS[model](), method, **options), MODELS[model]()
        expected, unmerged = alone(images), plain(images)
        patched = patch.apply(MODELS[model](), method, **options)
        wrapped = WRAPPERS[wrapper](patched).eval()
        torch.testing.assert_close(wrapped(images), expected, **CLOSE)
        for one in (wrapped, inner(wrapped, wrapper)):
            assert patch.is_patched(one) and patch.method(one) == method
            assert patch.reduction(one).lengths == patch.reduction(alone).lengths
        assert patch.remove(wrapped) is wrapped and not patch.is_patched(wrapped)
        torch.testing.assert_close(wrapped(images), unmerged, **CLOSE)
        assert not patch.is_patched(inner(wrapped, wrapper))


@torch.inference_mode()
def test_the_threshold_of_a_wrapped_model():
    images = different_images(3)
    wrapped = patch.apply(nn.DataParallel(segmenter()), "graph", threshold=0.2)
    for threshold in (1.0, 0.1):
        patch.set_threshold(wrapped, threshold)
        alone = patch.apply(segmenter(), "graph", threshold=threshold)
        torch.testing.assert_close(wrapped(images), alone(images), **CLOSE)
        assert patch.options(wrapped.module)["threshold"] == threshold


def test_training_through_a_wrapper_gives_the_gradients_of_training_alone():
    images, gradients = different_images(3), []
    for wrap in (lambda m: m, WRAPPERS["DataParallel"], WRAPPERS["DistributedDataParallel"]):
        model = segmenter(**MASKS)
        patch.add_modules(model.encoder, "dtem")
        wrapped = patch.apply(wrap(model), "dtem", r=2).train()
        wrapped(images).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any("metric_layer" in name for name in gradients[0])
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], **CLOSE)


@torch.inference_mode()
def test_an_average_of_a_patched_model_follows_it():
    images = different_images(3)
    model = patch.apply(segmenter(), "tome", r=2)
    average = AveragedModel(model)
    average.update_parameters(model)
    for parameter in model.parameters():
        parameter.zero_()
    expected = patch.apply(segmenter(), "tome", r=2)(images)
    torch.testing.assert_close(average(images), expected, **CLOSE)
    twin = copy.deepcopy(average)
    assert patch.reduction(twin) is None
    torch.testing.assert_close(twin(images), expected, **CLOSE)
    assert patch.reduction(twin).lengths == (10, 10, 10)
    assert not patch.is_patched(patch.remove(twin)) and patch.is_patched(average)
