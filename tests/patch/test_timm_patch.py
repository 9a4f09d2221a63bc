"""Patching any plain ViT of timm."""

import pytest
import timm
import torch

import patch
from g2tm import Grouping, attention_bias
from patch.families import family_of
from patch.layout import representatives
from tests.helpers import different_images, with_parts

MODELS = {
    "vit_tiny_patch16_384": {},
    "deit_tiny_distilled_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {},  # registers, layer scale
    "vit_base_patch16_siglip_224": {},  # no CLS token, attention pooling
    "deit3_small_patch16_224": {},
    "vit_medium_patch16_gap_240": {},  # average pooling, no CLS token
    "vit_base_patch16_clip_224": {},  # norm before the blocks
    "vit_tiny_patch16_224": {"qk_norm": True},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_448": {"qkv_fused": False},  # three projections
    "vit_small_patch16_dinov3": {},
    "vit_small_plus_patch16_dinov3": {},
    "vit_pe_core_tiny_patch16_384": {},
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_small_patch16_rope_mixed_ape_224": {},
    "eva_giant_patch14_224": {},  # without rotary embeddings
}
SETTINGS = {
    "graph": {"layers": [2], "threshold": 0.3},
    "algm": {"layers": [1, 3], "threshold": 0.1, "gbm_threshold": 0.3},
    "tome": {"r": 3},
    "keymatch": {"layers": [2, 3]},
    "tofu": {"r": 3},
    "dct": {"r": 3},
    "dtem": {"r": 3},
    "mpm": {"layers": [2, 3]},
}
NOTHING = {
    "graph": {"layers": [2], "threshold": 1.0},
    "algm": {"layers": [1, 3], "threshold": 1.0, "gbm_threshold": 1.0},
    "tome": {"r": 0},
    "tofu": {"r": 0},
    "dct": {"r": 0},
    "dtem": {"r": 0},
}


def create(name, **extra):
    """A narrow version with random weights, some of them large, so that tokens differ."""
    size = {"img_size": 64, "patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 7}
    model = timm.create_model(name, **size | MODELS[name] | extra).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model


@torch.inference_mode()
def test_nothing_merged_is_the_unpatched_model():
    images = torch.randn(2, 3, 64, 64)
    for name in MODELS:
        model = create(name)
        before, features = model(images), model.forward_features(images)
        for method, options in NOTHING.items():
            if method == "dtem":
                if getattr(model.blocks[0].attn, "qkv", None) is None:
                    continue
                patch.add_modules(model, "dtem")
            for attention in ("none", "proportional"):
                patch.apply(model, method, attention=attention, **options)
                torch.testing.assert_close(model(images), before, atol=1e-5, rtol=1e-5, msg=f"{name} {method}")
                torch.testing.assert_close(
                    model.forward_features(images), features, atol=1e-5, rtol=1e-5, msg=f"{name} {method}"
                )
                assert patch.reduction(model).lengths == (16, 16)
                patch.remove(model)


@torch.inference_mode()
@pytest.mark.slow
def test_every_kind_of_plain_vit():
    images = different_images(2, side=64)
    for name in MODELS:
        model = create(name)
        fused = getattr(model.blocks[0].attn, "qkv", None) is not None
        before, features, cls = model(images), model.forward_features(images), type(model)
        for method, options in SETTINGS.items():
            if method == "dtem" and not fused:
                continue
            with_parts(model, method)
            patch.apply(model, method, attention="proportional", **options)
            assert isinstance(model, cls) and model(images).shape == before.shape
            merged = model.forward_features(images)
            assert merged.shape == features.shape and merged.isfinite().all()
            reduction = patch.reduction(model)
            assert min(reduction.lengths) < 16, (name, method)
            torch.testing.assert_close(reduction.sizes.sum(1), torch.full((2,), 16.0))
            alone = torch.cat([model(image.unsqueeze(0)) for image in images])
            torch.testing.assert_close(model(images), alone, atol=1e-4, rtol=1e-4, msg=f"{name} {method}")
            patch.remove(model)
            assert type(model) is cls
            torch.testing.assert_close(model(images), before, atol=0, rtol=0)


def test_the_grid_and_the_prefix_of_every_kind():
    for name in MODELS:
        model = create(name, img_size=(32, 64))
        family = family_of(model)
        assert family.grid(model) == (2, 4) and family.n_prefix(model) == model.num_prefix_tokens
        assert len(family.blocks(model)) == 3


@torch.inference_mode()
def test_images_of_any_size_where_the_model_takes_them():
    for name in ("vit_tiny_patch16_384", "vit_small_patch16_dinov3", "eva02_tiny_patch14_224"):
        model = create(name, dynamic_img_size=True)
        for size in ((48, 96), (64, 64), (80, 32)):
            images, n_patches = torch.randn(2, 3, *size), size[0] // 16 * (size[1] // 16)
            before = model.forward_features(images)
            patch.apply(model, "graph", threshold=1.0)
            torch.testing.assert_close(model.forward_features(images), before, atol=1e-5, rtol=1e-5)
            patch.apply(patch.remove(model), "graph", threshold=0.3)
            assert model.forward_features(images).shape == before.shape
            assert patch.reduction(model).assignment.shape == (2, n_patches)
            patch.remove(model)


@torch.inference_mode()
def test_features_of_single_layers_have_all_patches():
    """timm's own methods, with and without a pass of their own, prefix tokens and the last norm."""
    for name in ("vit_tiny_patch16_384", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"):
        model, images = create(name), torch.randn(2, 3, 64, 64)
        asks = [
            lambda m, x: m.forward_intermediates(x, indices=[0, 1], intermediates_only=True),
            lambda m, x: m.forward_intermediates(x, 2, norm=True, output_fmt="NLC")[1],
            lambda m, x: [m.forward_intermediates(x, [0])[0]],
        ]
        if hasattr(model, "get_intermediate_layers"):  # timm's Eva lacks it
            asks.append(lambda m, x: m.get_intermediate_layers(x, n=2, reshape=True))
        for ask in asks:
            plain = ask(model, images)
            patch.apply(model, "graph", layers=[2], threshold=1.0)
            for found, expected in zip(ask(model, images), plain, strict=True):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            patch.remove(model)
            patch.apply(model, "tome", r=3)
            merged = ask(model, images)
            assert [one.shape for one in merged] == [one.shape for one in plain]
            alone = [ask(model, image[None]) for image in images]
            for index, found in enumerate(merged):
                expected = torch.cat([one[index] for one in alone])
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            patch.remove(model)
        patch.apply(model, "tome", r=3)
        first, last = model.forward_intermediates(images, indices=[0, 2], intermediates_only=True)
        for out, layer in ((first, 1), (last, 3)):
            groups = patch.reductions(model)[layer].assignment[0]
            rows = out[0].flatten(1).T
            assert all((rows[groups == group] == rows[groups == group][0]).all() for group in groups.unique())


@torch.inference_mode()
def test_pooling_is_weighted_by_size():
    """Against pooling over the merged tokens, weighted by size and with padding masked."""
    name, images = "vit_base_patch16_siglip_224", torch.randn(2, 3, 64, 64)
    for pool in ("avg", "map", "max"):
        model = create(name, global_pool=pool) if pool == "map" else create(name, global_pool=pool, fc_norm=False)
        patch.apply(model, "graph", layers=[2], threshold=0.3)
        features = model.forward_features(images)
        reduction = patch.reduction(model)
        tokens, padding = reduction.merge(features), reduction.sizes == 0
        if pool == "avg":
            expected = (tokens * reduction.sizes.unsqueeze(-1)).sum(1) / reduction.sizes.sum(1, keepdim=True)
        elif pool == "max":
            expected = tokens.masked_fill(padding.unsqueeze(-1), float("-inf")).amax(1)
        else:
            expected = model.attn_pool(tokens, attention_bias(reduction.sizes, "proportional", padding))
        assert tokens.shape[1] < features.shape[1]
        torch.testing.assert_close(model.pool(features), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(model(images), model.forward_head(features))


@torch.inference_mode()
def test_keys_are_those_after_their_norm_and_before_their_rotation():
    """The metric of ToMe is what attention compares, wherever it is taken from."""
    images = different_images(2, side=64)
    for name in MODELS:
        for fused in (True, False):
            model, seen, keys = create(name), [], []
            attn = model.blocks[0].attn
            attn.fused_attn = fused
            handle = attn.k_norm.register_forward_hook(lambda m, i, found, seen=seen: seen.append(found))
            model.forward_features(images)
            handle.remove()
            patch.apply(model, "tome", r=2, layers=[1])
            own = patch.find("tome").merge
            with patch.replaced_merge(model, lambda step, keys=keys, own=own: keys.append(step.keys) or own(step)):
                model.forward_features(images)
            expected = seen[0].mean(1)[:, model.num_prefix_tokens :]
            torch.testing.assert_close(keys[0], expected, atol=1e-5, rtol=1e-5, msg=name)


def test_the_representative_is_nearest_to_the_centroid():
    assignment = torch.tensor([[0, 0, 0, 1], [2, 2, 0, 1], [2, 2, 3, 1]]).view(1, 12)
    # group 0: top row and one below its end; 1: a column; 2: a square, four equally near; 3: one patch
    assert representatives(Grouping.of_length(assignment, 4), (3, 4)).tolist() == [[1, 7, 4, 10]]
    ragged = Grouping(torch.tensor([[0, 0, 1, 2], [0, 0, 0, 0]]), torch.tensor([3, 1]), [3, 1])
    assert representatives(ragged, (1, 4)).tolist() == [[0, 2, 3], [1, 0, 0]]  # padding: any


def test_gradients_and_training_mode():
    for name in ("vit_tiny_patch16_384", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"):
        model = create(name).train()
        patch.apply(model, "algm", layers=[1, 3], threshold=0.1, attention="proportional")
        model(torch.randn(2, 3, 64, 64)).sum().backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters()), name
        assert patch.reduction(model).padding is None  # uniform while training


def test_ragged_training_of_rotary_models_gives_the_gradients_of_single_images():
    """Packed, with stochastic depth switched off."""
    images = different_images(3, side=64)
    for name in ("vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"):
        model, gradients = create(name).train(), []
        patch.apply(model, "graph", threshold=0.3, attention="proportional", batch="ragged")
        for batches in ([images], images.split(1)):
            model.zero_grad()
            sum(model(batch).square().sum() for batch in batches).backward()
            gradients.append({key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None})
        torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_half_precision():
    images = different_images(2, side=64).bfloat16()
    for name in ("vit_tiny_patch16_384", "vit_small_patch16_dinov3"):
        model = create(name).bfloat16()
        for method in ("graph", "tome", "dct"):
            patch.apply(model, method, attention="proportional", **SETTINGS[method])
            found = model(images)
            assert found.dtype == torch.bfloat16 and found.isfinite().all()
            patch.remove(model)


def test_other_models_are_refused_with_the_reason():
    for name, reason in (
        ("swin_tiny_patch4_window7_224", "SwinTransformer.*Segmenter.*VisionTransformer.*Eva"),
        ("resnet18", "ResNet"),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
        ("eva02_tiny_patch14_224", None),
        ("vit_small_patch16_36x1_224", None),
    ):
        with torch.device("meta"):
            model = timm.create_model(name)
        if reason is None:
            patch.apply(model, "graph")
            continue
        with pytest.raises(ValueError, match=reason):
            patch.apply(model, "graph")
        assert not patch.is_patched(model)
    model = timm.models.eva.Eva(img_size=32, embed_dim=32, depth=2, num_heads=2, use_post_norm=True)
    with pytest.raises(ValueError, match="EvaBlockPostNorm"):
        patch.apply(model, "graph")


def test_patch_dropout_and_checkpointing_are_refused():
    for name in ("vit_tiny_patch16_384", "vit_small_patch16_dinov3"):
        with pytest.raises(ValueError, match="patch dropout"):
            patch.apply(create(name, patch_drop_rate=0.5), "tome")
        model = create(name)
        model.set_grad_checkpointing()
        with pytest.raises(ValueError, match="checkpointing"):
            patch.apply(model, "tome")
