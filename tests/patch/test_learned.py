"""Learned parts of methods."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import g2tm
import patch
from segm.model.factory import create_segmenter

METRIC = ("metric_layer.weight", "metric_layer.bias")


def vit(**options):
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "mlp_ratio": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **size | options).eval()


def test_modules_stand_under_the_published_names(small_net):
    model = create_segmenter(small_net)
    images = torch.randn(2, 3, 32, 32)
    keys, expected = set(model.state_dict()), model.eval()(images)
    for method in ("graph", "tome", "dct"):
        assert patch.has_modules(model.encoder, method)
        assert patch.add_modules(model.encoder, method) is model.encoder and set(model.state_dict()) == keys
    assert not patch.has_modules(model.encoder, "dtem")
    with pytest.raises(ValueError, match=r"patch\.add_modules\(encoder, 'dtem'\)"):
        patch.apply(model, "dtem")
    patch.add_modules(model.encoder, "dtem")
    assert patch.has_modules(model.encoder, "dtem")
    attn = [f"encoder.blocks.{i}.attn.qkv" for i in range(3)]
    own = {f"{name}.{part}" for name in attn for part in ("weight", "bias")}
    new = {f"{name}.qkv_layer.{part}" for name in attn for part in ("weight", "bias")}
    assert set(model.state_dict()) == (keys - own) | new | {f"{name}.{part}" for name in attn for part in METRIC}
    assert model.encoder.blocks[0].attn.qkv.metric_layer.weight.shape == (16, 32)  # as wide as a head
    assert torch.equal(model(images), expected)
    with pytest.raises(ValueError, match="already"):
        patch.add_modules(model.encoder, "dtem")
    assert patch.has_modules(copy.deepcopy(model).encoder, "dtem")


def test_the_embedding_of_wide_models_is_twice_a_head():
    with torch.device("meta"):
        model = timm.create_model("vit_large_patch16_224", depth=1)
    assert patch.add_modules(model, "dtem").blocks[0].attn.qkv.metric_layer.weight.shape == (128, 1024)


def test_models_without_one_projection_are_refused():
    model = timm.create_model(
        "eva02_base_patch14_448", embed_dim=32, depth=2, num_heads=2, img_size=28, qkv_fused=False
    )
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="one projection"):
        patch.add_modules(model, "dtem")
    assert list(model.state_dict()) == keys and not patch.has_modules(model, "dtem")
    for unknown in (lambda: patch.add_modules(model, "nosuch"), lambda: patch.has_modules(model, "nosuch")):
        with pytest.raises(ValueError, match="unknown method"):
            unknown()
    with pytest.raises(ValueError, match="Linear"):
        patch.add_modules(torch.nn.Linear(1, 1), "dtem")


def test_a_patch_changes_no_parameter_and_no_key(small_net):
    model = create_segmenter(small_net)
    patch.add_modules(model.encoder, "dtem")
    keys, parameters = list(model.state_dict()), [id(p) for p in model.parameters()]
    for method in ("dtem", "tome", "graph"):  # also others than the one that they belong to
        patch.apply(model, method)
        model(torch.randn(2, 3, 32, 32))
        assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
        patch.remove(model)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters


def test_training_keeps_all_tokens_and_trains_the_embedding(small_net):
    images = torch.randn(2, 3, 32, 32)
    for variant in ("code", "paper"):
        gradients = []
        for attention in ("proportional", "none"):
            torch.manual_seed(0)
            model = create_segmenter(small_net).train()
            patch.add_modules(model.encoder, "dtem")
            patch.apply(model, "dtem", r=3, variant=variant, attention=attention)
            torch.manual_seed(1)
            model(images).square().mean().backward()
            assert all(step.lengths == (16, 16) for step in patch.reductions(model).values())
            assert patch.reduction(model).sizes.sum(1).tolist() == pytest.approx([16, 16], abs=1e-3)
            layers = [block.attn.qkv.metric_layer for block in model.encoder.blocks]
            assert all(p.grad.isfinite().all() and p.grad.any() for layer in layers for p in layer.parameters())
            gradients.append(layers[-1].weight.grad)
        # through the sizes that the decoder attends by, besides the means
        assert not torch.allclose(*gradients, rtol=1e-2)


def test_a_training_step_brings_the_loss_down(small_net):
    model = create_segmenter(small_net).train()
    patch.add_modules(model.encoder, "dtem")
    patch.apply(model, "dtem", r=3, variant="paper")
    images, labels = torch.randn(2, 3, 32, 32), torch.randint(5, (2, 32, 32))
    metric = [p for name, p in model.named_parameters() if "metric_layer" in name]
    optimizer, losses = torch.optim.SGD(metric, lr=0.5), []
    for _ in range(6):
        optimizer.zero_grad()
        losses.append(F.cross_entropy(model(images), labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]


@torch.no_grad()
def test_the_training_form_is_that_of_a_slow_reference():
    """Halves by position, all tokens kept, sizes into the next attention."""
    model = vit()
    patch.add_modules(model, "dtem")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    images, r = torch.randn(2, 3, 64, 64), 20
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    sizes, live = torch.ones(2, 64), 64
    for block in model.blocks:
        h = block.norm1(x)
        bias = torch.cat([torch.zeros(2, 1), sizes.log()], 1)[:, None, None]
        x = x + block.attn(h, attn_mask=bias)
        metric = block.attn.qkv.metric_layer(h)[:, 1:]
        removed = min(r, live // 2)
        a, b = g2tm.split(sizes, live, random=False)
        step = g2tm.soft_merge(metric, r=removed, inverse_temperature=10.0, a_index=a, b_index=b, sizes=sizes)
        x, sizes, live = torch.cat([x[:, :1], step.merge(x[:, 1:])], 1), step.sizes.clamp(min=1e-6), live - removed
        x = x + block.mlp(block.norm2(x))
    patch.apply(model, "dtem", r=r, variant="paper")
    model.train()
    torch.testing.assert_close(model.forward_features(images), model.norm(x), atol=1e-4, rtol=1e-4)


def test_the_learned_metric_trains_on_a_rotary_model_too():
    model = timm.create_model(
        "vit_small_patch16_dinov3", img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=3
    ).train()
    patch.apply(patch.add_modules(model, "dtem"), "dtem", r=3)
    model(torch.randn(2, 3, 32, 32)).square().sum().backward()
    assert all(block.attn.qkv.metric_layer.weight.grad.any() for block in model.blocks)
