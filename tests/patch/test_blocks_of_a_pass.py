"""Every block of a pass runs once, in order, on the tokens of that pass: else one sentence says what is wrong."""

import copy
import types
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import patch
from tests.families import FAMILIES, segmenter, vit
from tests.helpers import METHOD_OPTIONS, different_images, right_or_refused, with_parts

NAMES = ["vit", "eva", "Dinov2", "mmseg", "mask transformer"]
LABELS = torch.arange(3 * 32 * 32).view(3, 32, 32) % 5
GRAPH = {"threshold": 0.2, "layers": [1]}


def refused(action, match):
    with pytest.raises(ValueError, match=match) as caught:
        action()
    assert "\n" not in str(caught.value)


class Around(nn.Module):
    """A module around a block that runs it in another way."""

    def __init__(self, block, run):
        super().__init__()
        self.block, self.run = block, run

    def forward(self, x, *args, **kwargs):
        return self.run(self.block, x, *args, **kwargs)


def twice(block, x, *args, **kwargs):
    return (block(x, *args, **kwargs) + block(x, *args, **kwargs)) / 2


def stack_of(name, model):
    blocks = list(FAMILIES[name].blocks(model))
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and list(m) == blocks)


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_a_block_that_runs_twice_in_a_pass(name):
    family, images = FAMILIES[name], different_images()
    for index in range(3):
        model = family.patched("tome", layers=[2])
        stack = stack_of(name, model)
        stack[index] = Around(stack[index], twice)
        refused(lambda model=model: family.run(model, images), f"block {index + 1} of the ViT ran")


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("place", [1, 99])
@pytest.mark.parametrize("stays", [True, False])
def test_prompts_that_join_after_a_merge(name, place, stays):
    """As deep prompts do: before the patches or after them, for one block or from then on."""
    family, images = FAMILIES[name], different_images()
    for options in ({"tokens": 7, "layers": [1]}, GRAPH):
        model = family.patched("graph", **options)
        block = list(family.blocks(model))[2]
        block.register_forward_pre_hook(
            lambda _, args: (torch.cat([args[0][:, :place], args[0][:, :2], args[0][:, place:]], 1), *args[1:])
        )
        if not stays:
            block.register_forward_hook(lambda _, __, x: torch.cat([x[:, :place], x[:, place + 2 :]], 1))
        refused(lambda model=model: family.run(model, images), "tokens")


class Headless(type(vit())):
    """Its features are those of the patches alone."""

    def forward_features(self, x):
        return super().forward_features(x)[:, 1:]


@torch.inference_mode()
def test_a_prefix_that_is_gone_before_the_way_back():
    model = vit()
    model.__class__ = Headless
    patch.apply(model, "graph", threshold=0.2)
    refused(lambda: model.forward_features(different_images()), "tokens")


def decoder_of(model):
    return model.decoder.blocks


def replaced(blocks, plain):
    blocks[0] = plain[0]


def appended(blocks, plain):
    blocks.append(plain[0])


def swapped(blocks, plain):
    blocks[0], blocks[1] = blocks[1], blocks[0]


def passed_by(blocks, plain):
    blocks[1].forward = types.MethodType(type(plain[1]).forward, blocks[1])


def cut(blocks, plain):
    del blocks[1:]


@torch.inference_mode()
@pytest.mark.parametrize("change", [replaced, appended, swapped, passed_by, cut])
def test_blocks_of_a_decoder_that_change_after_patching(change):
    """Right is the model that was changed first."""
    build = lambda: segmenter(decoder={"name": "mask_transformer", "n_layers": 2, "dropout": 0.0})  # noqa: E731
    images, plain, model = different_images(), build(), patch.apply(build(), "graph", **GRAPH)
    blocks = copy.deepcopy(decoder_of(plain))
    change(decoder_of(plain), copy.deepcopy(blocks))
    if change is passed_by:
        del decoder_of(plain)[1].forward
    expected = patch.apply(plain, "graph", **GRAPH)(images)
    change(decoder_of(model), blocks)
    right_or_refused(lambda: model(images), expected, atol=1e-4)


@torch.inference_mode()
def test_a_block_of_another_patched_model():
    """It belongs to the passes of that one."""
    model, other = vit(), vit()
    patch.apply(model, "graph", **GRAPH)
    patch.apply(other, "tome", r=2)
    model.blocks[1] = other.blocks[1]
    refused(lambda: model(different_images()), "block 2 of the ViT is not the one")


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "method"),
    [("vit", "forward_features"), ("vit", "forward_intermediates"), ("segmenter", "network"), ("segmenter", "to_grid")],
)
def test_other_methods_of_the_instance(name, method):
    """They are bound to the function of the class, which a patch takes the place of."""
    model, images = FAMILIES[name].build(), different_images()
    setattr(model, method, getattr(model, method))
    refused(lambda: patch.apply(model, "tome", r=2), method)
    delattr(model, method)
    expected = patch.apply(FAMILIES[name].build(), "tome", r=2)(images)
    torch.testing.assert_close(patch.apply(model, "tome", r=2)(images), expected)


def gradients(model, images, wrap=lambda model: model):
    model.zero_grad()
    wrap(model)(images).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["vit", "eva", "mask transformer"])
def test_blocks_that_a_checkpoint_runs_again(name, reentrant):
    """In the backward pass nobody knows what merged."""
    images = different_images().requires_grad_()
    for options in ({"tokens": 7, "layers": [1]}, GRAPH, GRAPH | {"batch": "uniform"}):
        model = FAMILIES[name].patched("graph", **options).train()
        stack = getattr(model, "encoder", model).blocks

        def again(block, *args, **kwargs):
            return checkpoint(partial(block, **kwargs), *args, use_reentrant=reentrant)

        stack[2] = Around(stack[2], again)
        refused(lambda model=model: gradients(model, images), "checkpoint")


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_model_or_parts_of_a_block(reentrant):
    images, model = different_images().requires_grad_(), patch.apply(vit(), "graph", **GRAPH).train()
    expected = gradients(model, images)
    whole = gradients(model, images, lambda model: lambda x: checkpoint(model, x, use_reentrant=reentrant))
    torch.testing.assert_close(whole, expected)
    for block in model.blocks:
        own = block.mlp.forward
        block.mlp.forward = lambda x, own=own: checkpoint(own, x, use_reentrant=reentrant)
    torch.testing.assert_close(gradients(model, images), expected)


def test_a_loss_without_gradients_is_said():
    """A checkpoint that records none would leave the loss of the method out of the training."""
    images, model = different_images().requires_grad_(), FAMILIES["segmenter"].patched("clustvit").train()
    model(images)
    output = checkpoint(model, images, use_reentrant=True)
    refused(lambda: patch.loss(model, LABELS), "use_reentrant=False")
    with torch.no_grad():
        assert patch.loss(model, LABELS) > 0
    del output


def test_the_loss_of_no_image_is_not_that_of_the_images_before():
    model, images = FAMILIES["segmenter"].patched("clustvit").train(), different_images()
    output = model(images)
    assert patch.loss(model, LABELS) > 0
    model(images[:0])
    refused(lambda: patch.loss(model, LABELS[:0]), "training pass")
    del output


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit", "eva"])
def test_another_input_size_after_patching(name):
    """It is as if the size had been set before."""
    images = torch.randn(2, 3, 64, 64)
    for method in ("ltmp", "algm", "tome"):
        outputs = []
        for first in (True, False):
            model = with_parts(FAMILIES[name].build(), method)
            if first:
                model.set_input_size((64, 64))
            patch.apply(model, method, **METHOD_OPTIONS[method])
            if not first:
                model.set_input_size((64, 64))
            outputs.append(model(images))
        torch.testing.assert_close(*outputs, msg=method)


@torch.inference_mode()
def test_a_schedule_goes_by_the_blocks_that_are_there():
    images, outputs = different_images(), []
    for first in (True, False):
        model = vit()
        if first:
            del model.blocks[2:]
        patch.apply(model, "tome", r=3, r_inflection=1.0, layers=[1, 2])
        if not first:
            del model.blocks[2:]
        outputs.append(model(images))
    torch.testing.assert_close(*outputs)


def test_an_embedding_that_did_not_run():
    """Nobody knows the grid then."""
    model = FAMILIES["Dinov2"].build()

    class Own(type(model)):
        def forward(self, x):
            return self.encoder(x)

    model.__class__ = Own
    patch.apply(model, "tome", r=2)
    refused(lambda: model(torch.randn(2, 17, 32)), "embedding")
