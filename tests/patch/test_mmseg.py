"""mmsegmentation's models: patched, they give what timm's give with the same weights."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn

import patch
from tests.helpers import METHOD_OPTIONS
from tests.patch.test_transformers import both

SIDE, PATCH, WIDTH, DEPTH, HEADS = 48, 8, 32, 4, 2
OPTIONS = {name: options for name, options in METHOD_OPTIONS.items() if name not in ("dtem", "clustvit")} | {
    "diffrate": {"r": 4}
}


@pytest.fixture(scope="module")
def vit():
    """Builds mmsegmentation's ViT with random weights; its import prints, so it comes late."""
    from segm.data import openmmlab  # noqa: F401 -- registers, and keeps the import quiet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmseg.models import VisionTransformer

    def build(**more):
        sizes = {"img_size": (SIDE, SIDE), "patch_size": PATCH, "embed_dims": WIDTH, "num_layers": DEPTH}
        norm = {"type": "LN", "eps": 1e-6}
        model = VisionTransformer(
            **sizes | {"num_heads": HEADS, "norm_cfg": norm, "final_norm": True, "patch_bias": True} | more
        )
        model.eval()  # returns nothing in mmengine
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.3)
        return model

    return build


def build_timm(model):
    """timm's model with the weights of mmsegmentation's."""
    size = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    other = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size).eval()
    with torch.no_grad():
        for (ours,), theirs in pairs(model, other):
            theirs.copy_(ours)
    return other


def pairs(model, other):
    yield from both(model.patch_embed.projection, other.patch_embed.proj)
    yield [model.cls_token], other.cls_token
    yield [model.pos_embed], other.pos_embed
    for layer, block in zip(model.layers, other.blocks, strict=True):
        attn = layer.attn.attn
        yield [attn.in_proj_weight], block.attn.qkv.weight
        yield [attn.in_proj_bias], block.attn.qkv.bias
        yield from both(attn.out_proj, block.attn.proj)
        yield from both(layer.norm1, block.norm1)
        yield from both(layer.norm2, block.norm2)
        yield from both(layer.ffn.layers[0][0], block.mlp.fc1)
        yield from both(layer.ffn.layers[1], block.mlp.fc2)
    yield from both(model.norm1, other.norm)


@torch.inference_mode()
def test_every_method_gives_what_timms_model_gives(vit):
    images = torch.randn(3, 3, 3, 3).repeat_interleave(16, 2).repeat_interleave(16, 3)
    images = images + 0.3 * torch.randn(3, 3, SIDE, SIDE)
    model = vit()
    other = build_timm(model)

    def features(one):
        norm, one.norm = one.norm, nn.Identity()  # transforms are undone before the last norm, as in the model beside
        return norm(one.forward_features(images))[:, 1:].transpose(1, 2).unflatten(2, (6, 6))

    plain = model(images)[-1]
    torch.testing.assert_close(plain, features(copy.deepcopy(other)), atol=1e-4, rtol=1e-4)
    for method, options in OPTIONS.items():
        for mode in ("none", "proportional"):
            own, theirs = copy.deepcopy(model), copy.deepcopy(other)
            for one in (own, theirs):
                patch.apply(one, method, **options, attention=mode)
            torch.testing.assert_close(own(images)[-1], features(theirs), atol=2e-4, rtol=2e-4)
            assert torch.equal(patch.reduction(own).counts, patch.reduction(theirs).counts)
            assert patch.reduction(own).counts.max() < 36
            patch.remove(own)
            assert torch.equal(own(images)[-1], plain)


@torch.inference_mode()
def test_every_output_has_all_patches(vit):
    model, images = vit(out_indices=[0, 2, 3]), torch.randn(2, 3, SIDE, 40)
    plain = model(images)
    patch.apply(model, "tome", r=4)
    merged = model(images)
    assert [out.shape for out in merged] == [out.shape for out in plain] == [(2, WIDTH, 6, 5)] * 3
    for out, layer in zip(merged, (1, 3, 4), strict=True):
        flat = out[0].flatten(1).T
        groups = patch.reductions(model)[layer].assignment[0]
        assert all((flat[groups == group] == flat[groups == group][0]).all() for group in groups.unique())
    patch.remove(model)
    patch.apply(model, "graph", layers=[2], threshold=1.0)
    for out, expected in zip(model(images), plain, strict=True):
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_a_whole_segmentor(vit):
    from mmseg.models import build_segmentor

    backbone = {"type": "VisionTransformer", "img_size": (SIDE, SIDE), "patch_size": PATCH, "embed_dims": WIDTH}
    backbone |= {"num_layers": DEPTH, "num_heads": HEADS, "final_norm": True}
    head = {"type": "SegmenterMaskTransformerHead", "in_channels": WIDTH, "channels": WIDTH, "num_classes": 5}
    head |= {"num_layers": 2, "num_heads": HEADS, "embed_dims": WIDTH, "dropout_ratio": 0.0}
    config = {"type": "EncoderDecoder", "backbone": backbone, "decode_head": head, "test_cfg": {"mode": "whole"}}
    model, images = build_segmentor(config).eval(), torch.randn(2, 3, SIDE, SIDE)
    plain = model(images)
    patch.apply(model, "graph", layers=[2], tokens=20)
    merged = model(images)
    assert merged.shape == plain.shape and patch.reduction(model).counts.tolist() == [20, 20]
    assert not torch.allclose(merged, plain)
    patch.remove(model)
    assert torch.equal(model(images), plain) and not patch.is_patched(model)


def test_checkpoints_are_refused(vit):
    model = vit(with_cp=True)
    model.train()
    patch.apply(model, "tome", r=4)
    with pytest.raises(ValueError, match="with_cp=False"):
        model(torch.randn(1, 3, SIDE, SIDE, requires_grad=True))
