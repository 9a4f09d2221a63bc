"""Further ViTs of transformers: the towers of CLIP, SigLIP 2 and MAE, EoMT on DINOv3."""

import pytest
import torch

import patch
from patch.families import models_within
from tests.families import hugging
from tests.helpers import different_images

transformers = pytest.importorskip("transformers")
QUERIES = {"num_blocks": 1, "num_queries": 4, "num_labels": 3, "num_upscale_blocks": 1, "num_register_tokens": 2}
KINDS = {
    "CLIPVision": {},
    "MetaClip2Vision": {},
    "ViTMAE": {"mask_ratio": 0.0},
    "ViTMSN": {},
    "IJepa": {},
    "Siglip2Vision": {"num_patches": 16, "vision_use_head": False},
    "EomtDinov3": QUERIES,
}


def build(kind, attention="sdpa"):
    cls = "ForUniversalSegmentation" if kind == "EomtDinov3" else "Model"
    model = hugging(kind, attention, cls, **KINDS[kind])
    if kind == "EomtDinov3":
        model.attn_mask_probs.zero_()
    return model


def squares(images):
    """(B, 3, 32, 32) -> what SigLIP 2 takes: 16 patches of 8 pixels each."""
    tokens = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    return {
        "pixel_values": tokens,
        "pixel_attention_mask": torch.ones(len(images), 16, dtype=torch.bool),
        "spatial_shapes": torch.tensor([[4, 4]] * len(images)),
    }


def run(kind, model, images):
    if kind == "Siglip2Vision":
        return model(**squares(images)).last_hidden_state
    if kind == "ViTMAE":
        found = model(images, noise=torch.arange(16.0).repeat(len(images), 1)).last_hidden_state
        if patch.is_patched(model):
            assert torch.equal(model(images).last_hidden_state, found)
        return found
    found = model(images)
    return found.masks_queries_logits if kind == "EomtDinov3" else found.last_hidden_state


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_merged_is_the_plain_model_and_a_batch_its_images(kind):
    images = different_images(3)
    for attention in ("sdpa", "eager"):
        model = build(kind, attention)
        plain = run(kind, model, images)
        unit = plain.abs().max()
        patch.apply(model, "graph", layers=[1], threshold=1.0)
        torch.testing.assert_close(run(kind, model, images) / unit, plain / unit, atol=1e-5, rtol=1e-4)
        patch.remove(model)
        patch.apply(model, "graph", layers=[1], threshold=0.2, attention="proportional")
        found = run(kind, model, images)
        assert patch.reduction(model).counts.min() < 16 and found.shape == plain.shape
        single = torch.cat([run(kind, model, image[None]) for image in images])
        torch.testing.assert_close(found / unit, single / unit, atol=1e-5, rtol=1e-4)
        patch.remove(model)
        assert torch.equal(run(kind, model, images), plain)


@torch.inference_mode()
def test_what_they_cannot_do_is_said():
    images = different_images(2)
    model = patch.apply(build("ViTMAE"), "tome", r=2)
    with pytest.raises(ValueError, match="pass no noise"):
        model(images, noise=torch.arange(16.0).flip(0).repeat(2, 1))
    patch.remove(model).config.mask_ratio = 0.75
    with pytest.raises(ValueError, match="mask_ratio = 0"):
        patch.apply(model, "tome", r=2)
    model, given = patch.apply(build("Siglip2Vision"), "tome", r=2), squares(images)
    with pytest.raises(ValueError, match="no attn_mask"):
        model(**given | {"pixel_attention_mask": torch.arange(16).repeat(2, 1) < 12})
    with pytest.raises(ValueError, match="one shape at a time"):
        model(**given | {"spatial_shapes": torch.tensor([[4, 4], [2, 8]])})


def test_a_tower_of_text_is_none():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vision = sizes | {"image_size": 32, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=sizes, vision_config=vision, projection_dim=8)
    assert [*models_within(transformers.CLIPModel(config))] == ["vision_model"]
