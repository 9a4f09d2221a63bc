"""Every kind of attention of timm's ViTs is refused with a reason, or merges the same tokens however it runs."""

import inspect

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models._registry import model_entrypoint
from timm.models.eva import Eva
from timm.models.vision_transformer import ATTN_LAYERS

import patch
from tests.families import FAMILIES, vit
from tests.helpers import METHOD_OPTIONS, different_images, options_for, with_parts

QUICK = ("graph", "tome", "mctf", "ltmp", "diffrate", "fpet")  # what methods ask of attention: nothing to all of it


class Own(Attention):
    """A subclass that changes nothing."""


class Twice(Attention):
    """Runs fused attention twice, the second time with other keys."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        first = self.attend(q, k, v, attn_mask)
        second = self.attend(k, q.roll(1, 1), v, attn_mask)
        return self.proj((first - 0.3 * second).transpose(1, 2).flatten(2))

    def attend(self, q, k, v, mask):
        if self.fused_attn:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        logits = q @ k.mT * self.scale
        return (logits if mask is None else logits + mask).softmax(-1) @ v


class Sharper(Attention):
    """Scales its keys on the way, by code of its own: they are not what the projection gives."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        k = k * torch.linspace(0.1, 3, k.shape[-1])
        if self.fused_attn:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        else:
            logits = q @ k.mT * self.scale
            out = (logits if attn_mask is None else logits + attn_mask).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2))


def names_of_differential_models():
    """timm's names whose attention is differential."""
    names = timm.list_models("vit_*")
    return [name for name in names if "attn_layer='diff'" in inspect.getsource(model_entrypoint(name))]


KINDS = {
    **{f"layer {name!r}": {"attn_layer": name} for name in ATTN_LAYERS},
    **{name: {"name": name} for name in names_of_differential_models()},
    "norms": {"qk_norm": True, "scale_attn_norm": True},
    "no bias": {"qkv_bias": False},
    "own": {"attn_layer": Own},
    "twice": {"attn_layer": Twice},
    "sharper": {"attn_layer": Sharper},
    "eva": {"name": "vit_small_patch16_dinov3"},
    "eva, three projections": {"name": "eva02_base_patch14_448", "qkv_fused": False},
    "eva, norms": {"name": "eva02_base_patch14_448", "scale_attn_inner": True, "qk_norm": True},
    "eva, biases": {"name": "vit_small_patch16_dinov3_qkvb"},
    "rope": {"name": "vit_small_patch16_rope_224"},
    "rope mixed": {"name": "vit_small_patch16_rope_mixed_224"},
    "rope, shared keys": {
        "name": "vit_small_patch16_rope_224",
        "num_kv_heads": 1,
        "qkv_fused": False,
        "attn_type": "rope",
    },
    "pe": {"name": "vit_pe_core_base_patch16_224"},
}
YOUNG = ("eva, norms", "rope, shared keys")  # timm builds them since 1.0.31


def build(kind):
    if kind in YOUNG and "num_kv_heads" not in inspect.signature(Eva).parameters:
        pytest.skip(f"timm {timm.__version__} has no such model")
    return vit(**KINDS[kind])


def outcome(model, images):
    """The partition, as the first patch of every patch's token, (B, N), where there is one; and the output."""
    output = model.forward_features(images)
    groups = getattr(patch.reduction(model), "assignment", None)
    if groups is None:
        return torch.zeros(len(images), 1), output
    return (groups.unsqueeze(2) == groups.unsqueeze(1)).int().argmax(2), output


def check_kind(kind, methods):
    images = different_images(3)
    for method in methods:
        try:
            model = build(kind)
            with_parts(model, method)
            patch.apply(model, method, **options_for(method))
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error).split()) > 5, error
            continue
        fused = outcome(model, images)
        alone = [outcome(model, image[None]) for image in images]
        torch.testing.assert_close(torch.cat([one[1] for one in alone]), fused[1], atol=1e-4, rtol=1e-4)
        assert torch.equal(torch.cat([one[0] for one in alone]), fused[0]), (kind, method)
        handle = model.blocks[0].attn.register_forward_hook(lambda *_: None)
        hooked = outcome(model, images)
        handle.remove()
        for block in model.blocks:
            block.attn.fused_attn = False
        for how, other in (("hooked", hooked), ("explicit", outcome(model, images))):
            assert torch.equal(other[0], fused[0]), (kind, method, how)
            torch.testing.assert_close(other[1], fused[1], atol=1e-4, rtol=1e-4, msg=f"{kind} {method} {how}")


def test_differential_attention_is_found():
    assert len(names_of_differential_models()) >= 2


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_merge_however_attention_runs(kind):
    check_kind(kind, QUICK)


@pytest.mark.nightly
@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_merge_in_every_method(kind):
    check_kind(kind, METHOD_OPTIONS)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_an_attention_that_is_taken_is_right(kind):
    """Where nothing merges, a patched model is the unpatched one."""
    images = different_images(2)
    model = build(kind)
    expected = model.forward_features(images)
    for method, options in (("graph", {"threshold": 1.0}), ("tome", {"r": 0}), ("mctf", {"r": 0}), ("dct", {"r": 0})):
        try:
            patch.apply(model, method, **options, attention="proportional")
        except ValueError as error:
            assert "\n" not in str(error)
            continue
        torch.testing.assert_close(model.forward_features(images), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(patch.remove(model).forward_features(images), expected)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["Dinov2", "ViT", "DPT", "DINOv3ViT", "SiglipVision", "Eomt"])
def test_so_does_the_attention_of_transformers(name):
    family, images = FAMILIES[name], different_images(3)
    for method in family.methods:
        outputs, tokens = [], []
        for attention in ("sdpa", "eager"):
            model = family.patched(method, model=family.build(attention=attention))
            outputs.append(family.run(model, images))
            tokens.append(patch.reduction(model).counts)
        assert torch.equal(*tokens), (name, method)
        torch.testing.assert_close(*outputs, atol=2e-4, rtol=2e-4, msg=f"{name} {method}")
