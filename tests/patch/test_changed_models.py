"""A model whose blocks are changed around a patch is right or refused in one sentence; never wrong in silence."""

import copy
import types

import pytest
import torch
from torch import nn

import patch
from tests.families import FAMILIES
from tests.helpers import METHOD_OPTIONS, by_speed, different_images, right_or_refused

NAMES = ["vit", "eva", "Dinov2", "ViT", "DPT", "DINOv3ViT", "SiglipVision", "mmseg", "segmenter"]
QUICK = ("graph", "tome")


def own_forward(module):
    """What any monkey patch does: the function of the class, set on the instance."""
    module.forward = types.MethodType(type(module).forward, module)


def wrapped_forward(module):
    """What accelerate's hooks do: a function around the method of the instance."""
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)


def outer(name, model):
    """The modules beside the blocks whose calls begin or end a pass."""
    encoder = getattr(model, "encoder", model) if name == "segmenter" else model
    embeddings = getattr(encoder, "patch_embed", None) or encoder.embeddings
    return {"model": model, "encoder": encoder, "embeddings": embeddings}


def check(name, method, change, before):
    """`change` is called with the model, before or after patching."""
    family, images = FAMILIES[name], different_images(3)
    with torch.inference_mode():
        expected = family.run(family.patched(method), images)

        def action():
            model = family.build()
            if before:
                change(model)
            family.patched(method, model=model)
            if not before:
                change(model)
            return family.run(model, images)

        right_or_refused(action, expected)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("forward", [own_forward, wrapped_forward])
@pytest.mark.parametrize("before", [True, False])
def test_a_forward_on_the_instance(name, forward, before):
    for index in range(3):  # before the merging block, on it, after it
        check(name, "graph", lambda model, i=index: forward(list(FAMILIES[name].blocks(model))[i]), before)
    check(name, "tome", lambda model: [forward(block) for block in FAMILIES[name].blocks(model)], before)
    for part in ("model", "encoder", "embeddings"):
        check(name, "tome", lambda model, part=part: forward(outer(name, model)[part]), before)


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
def test_after_remove_a_forward_on_the_instance_is_the_callers(name):
    """It may call a method that is no longer there, but then that is said."""
    family, images = FAMILIES[name], different_images(2)
    expected = family.run(family.build(), images)
    model = family.patched("graph")
    for module in model.modules():
        wrapped_forward(module)

    def action():
        return family.run(patch.remove(model), images)

    right_or_refused(action, expected)


def replaced(stack):
    stack[1] = unpatched(stack[1])


def appended(stack):
    stack.append(unpatched(stack[2]))


def cut(stack):
    del stack[2:]


class Around(nn.Module):
    """A block in another module, as checkpoint wrappers and quantizers do it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs):
        return self.block(*args, **kwargs)


def exchanged(stack):
    stack[1] = Around(stack[1])


def unpatched(block):
    """A block of the family's own class, with the weights of a block that may be patched."""
    twin = UNPATCHED[type(block).__name__.removeprefix("Patched")]
    twin = copy.deepcopy(twin)
    twin.load_state_dict(block.state_dict())
    return twin


UNPATCHED = {}


@torch.inference_mode()
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", [replaced, appended, cut, exchanged])
def test_blocks_that_are_replaced_appended_cut_or_wrapped_after_patching(name, change):
    """The right values are those of the model that is changed first, where that can be patched."""
    if (name, change) == ("mmseg", cut):
        pytest.skip("mmsegmentation's ViT gives the output of a block that is gone")
    family, images = FAMILIES[name], different_images(3)
    for method in QUICK:
        plain = family.build()
        UNPATCHED.update({type(b).__name__: copy.deepcopy(b) for b in family.blocks(plain)})
        if change is not exchanged:
            change(stack_of(name, plain))
        model = family.patched(method)
        change(stack_of(name, model))
        if hasattr(plain, "config"):
            for one in (plain, model):
                one.config.num_hidden_layers = len(stack_of(name, one))
        layers = [layer for layer in patch.options(model)["layers"] if layer <= len(stack_of(name, plain))]
        patch.apply(plain, method, **METHOD_OPTIONS[method] | {"layers": layers})
        expected = family.run(plain, images)
        right_or_refused(lambda model=model: family.run(model, images), expected, atol=1e-4)


def stack_of(name, model):
    blocks = list(FAMILIES[name].blocks(model))
    return next(m for m in model.modules() if isinstance(m, nn.ModuleList | nn.Sequential) and list(m) == blocks)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit", "eva"])
def test_layers_that_timm_prunes_after_patching(name):
    family, images = FAMILIES[name], different_images(3)
    for method in QUICK:
        plain, model = family.build(), family.patched(method)
        for one in (plain, model):
            assert one.prune_intermediate_layers([1], prune_head=True) == [1]
        layers = [layer for layer in patch.options(model)["layers"] if layer <= 2]
        patch.apply(plain, method, **METHOD_OPTIONS[method] | {"layers": layers})
        for ask in (
            lambda m: m.forward_features(images),
            lambda m: m.forward_intermediates(images, [1], intermediates_only=True)[0],
        ):
            right_or_refused(lambda model=model, ask=ask: ask(model), ask(plain))
        assert not patch.is_patched(patch.remove(model)) and type(model) is type(family.build())


HUGGING = ["Dinov2", "ViT", "DPT", "DINOv3ViT", "SiglipVision", "Eomt"]


@torch.inference_mode()
@pytest.mark.parametrize("name", HUGGING)
def test_attention_that_is_set_after_patching(name):
    """Between sdpa and eager the values stay, in both directions."""
    family, images = FAMILIES[name], different_images(3)
    for method in family.methods:
        model = family.patched(method)
        expected = family.run(model, images)
        for attention in ("eager", "sdpa"):
            model.set_attn_implementation(attention)
            torch.testing.assert_close(family.run(model, images), expected, atol=2e-4, rtol=2e-4)


@torch.inference_mode()
@pytest.mark.parametrize(
    "name",
    by_speed([name for name in HUGGING if name != "Eomt"], slow=["ViT"]),
)  # which transformers refuses itself
def test_attention_that_takes_no_mask_of_ours_is_refused_when_it_is_set(name):
    """Flex attention, after patching as before."""
    family, images = FAMILIES[name], different_images(3)
    for method in QUICK:
        model = family.patched(method, attention="proportional")
        expected = family.run(model, images)
        model.set_attn_implementation("flex_attention")
        right_or_refused(lambda model=model: family.run(model, images), expected, match="flex_attention", atol=2e-4)
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(family.run(model, images), expected, atol=1e-5, rtol=1e-5)
        patch.remove(model).set_attn_implementation("flex_attention")
        with pytest.raises(ValueError, match="flex_attention"):
            patch.apply(model, method)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit", "eva", "segmenter"])
def test_explicit_attention_that_is_set_after_patching(name):
    """timm's switch: the values stay."""
    family, images = FAMILIES[name], different_images(3)
    for method in family.methods:
        model = family.patched(method)
        expected = family.run(model, images)
        for block in family.blocks(model):
            block.attn.fused_attn = False
        torch.testing.assert_close(family.run(model, images), expected, atol=2e-4, rtol=2e-4, msg=f"{name} {method}")
