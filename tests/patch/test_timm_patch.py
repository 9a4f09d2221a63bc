"""Patching any plain ViT of timm."""

import pytest
import timm
import torch

import patch
from g2tm import Reduction, attention_bias

MODELS = {
    "vit_tiny_patch16_384": {"img_size": 64},
    "deit_tiny_distilled_patch16_224": {"img_size": 64},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},  # registers, layer scale
    "vit_base_patch16_siglip_224": {"img_size": 64},  # no CLS token, attention pooling
    "deit3_small_patch16_224": {"img_size": 64},
    "vit_medium_patch16_gap_240": {"img_size": 64},  # average pooling, no CLS token
    "vit_base_patch16_clip_224": {"img_size": 64},  # norm before the blocks
}
SETTINGS = {
    "graph": {"layers": [2], "threshold": 0.3},
    "algm": {"layers": [1, 3], "threshold": 0.1, "gbm_threshold": 0.3},
    "tome": {"r": 3},
}


def create(name, **extra):
    """A narrow version with random weights, some of them large, so that tokens differ."""
    model = timm.create_model(name, embed_dim=32, depth=4, num_heads=2, num_classes=7, **MODELS[name], **extra).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model


@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_every_kind_of_plain_vit(name, method):
    model, images = create(name), torch.randn(2, 3, MODELS[name]["img_size"], MODELS[name]["img_size"])
    before, features, classes = model(images), model.forward_features(images), type(model)
    patch.timm(model, method, **SETTINGS[method])
    assert model(images).shape == before.shape
    merged = model.forward_features(images)
    assert merged.shape == features.shape
    reduction = patch.reduction(model)
    assert (reduction.counts < reduction.assignment.shape[1]).any()
    assert (reduction.sizes.sum(1) == reduction.assignment.shape[1]).all()
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(model(images), alone, atol=1e-4, rtol=1e-4)
    patch.remove(model)
    assert type(model) is classes and torch.equal(model(images), before)


@torch.inference_mode()
def test_features_of_single_layers_are_refused():
    """timm would put the merged tokens on the grid as if they were patches."""
    model, images = create("vit_tiny_patch16_384"), torch.randn(1, 3, 64, 64)
    patch.timm(model, "tome", r=3)
    for ask in (model.forward_intermediates, model.get_intermediate_layers):
        with pytest.raises(ValueError, match="forward_features"):
            ask(images)
    assert patch.remove(model).forward_intermediates(images, intermediates_only=True)[0].shape == (1, 32, 4, 4)


@pytest.mark.parametrize("pool", ["avg", "map", "max"])
@torch.inference_mode()
def test_pooling_is_weighted_by_size(pool):
    """Against pooling over the merged tokens, weighted by size and with padding masked."""
    name = "vit_base_patch16_siglip_224"
    model = create(name, global_pool=pool) if pool == "map" else create(name, global_pool=pool, fc_norm=False)
    images = torch.randn(2, 3, 64, 64)
    patch.timm(model, "graph", layers=[2], threshold=0.3)
    features = model.forward_features(images)
    reduction = patch.reduction(model)
    tokens, padding = reduction.merge(features), reduction.sizes == 0
    expected = {
        "avg": lambda: (tokens * reduction.sizes.unsqueeze(-1)).sum(1) / reduction.sizes.sum(1, keepdim=True),
        "max": lambda: tokens.masked_fill(padding.unsqueeze(-1), float("-inf")).amax(1),
        "map": lambda: model.attn_pool(tokens, attention_bias(reduction.sizes, "proportional", padding)),
    }[pool]()
    assert tokens.shape[1] < features.shape[1]
    torch.testing.assert_close(model.pool(features), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(model(images), model.forward_head(features))


@torch.inference_mode()
def test_keys_are_those_after_their_norm():
    """qk-norm: the metric of ToMe is what attention compares."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=3, num_heads=2, qk_norm=True)
    seen, images = [], torch.randn(1, 3, 64, 64)
    model.blocks[0].attn.k_norm.register_forward_hook(lambda m, i, keys: seen.append(keys))
    patch.timm(model.eval(), "tome", r=2, layers=[1])
    keys = []
    step = patch.METHODS["tome"].merge
    model.merging.method = model.merging.method.__class__(
        lambda s: keys.append(s.keys) or step(s), model.merging.method.defaults, model.merging.method.check, True
    )
    model(images)
    torch.testing.assert_close(keys[0], seen[0].mean(1))


def test_gradients_and_training_mode():
    model = create("vit_tiny_patch16_384").train()
    patch.timm(model, "algm", layers=[1, 3], threshold=0.1)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not patch.reduction(model).padded  # uniform while training


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer"),
        ("resnet18", "ResNet"),
        ("eva02_tiny_patch14_224", "Eva"),
        ("vit_small_patch16_36x1_224", None),
        ("vit_small_patch16_18x2_224", "ParallelThingsBlock"),
    ],
)
def test_other_models_are_refused_with_the_reason(name, reason):
    with torch.device("meta"):
        model = timm.create_model(name)
    if reason is None:
        patch.timm(model, "graph")
        return
    with pytest.raises(ValueError, match=reason):
        patch.timm(model, "graph")
    assert not patch.is_patched(model)


def test_patch_dropout_is_refused():
    with pytest.raises(ValueError, match="patch dropout"):
        patch.timm(create("vit_tiny_patch16_384", patch_drop_rate=0.5), "tome")


@torch.inference_mode()
def test_a_registered_method_works_in_timm_too():
    def merge(step):
        n_images, n_tokens = step.x.shape[:2]
        everything = torch.zeros(n_images, n_tokens, dtype=torch.long)
        return Reduction(everything, torch.ones(n_images, dtype=torch.long), [1] * n_images, step.sizes)

    patch.register("one", merge, layers=(2,))
    try:
        model = patch.timm(create("vit_tiny_patch16_384"), "one")
        features = model.forward_features(torch.randn(1, 3, 64, 64))
        assert torch.equal(features[:, 1:], features[:, 1:2].expand(-1, 16, -1))
    finally:
        del patch.METHODS["one"]
