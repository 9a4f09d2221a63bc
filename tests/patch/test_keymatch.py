"""The method that is taken where none is named."""

import pytest
import timm
import torch

import g2tm
import patch


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    kind = {"img_size": 128, "patch_size": 8, "embed_dim": 32, "depth": 12, "num_heads": 2, "num_classes": 0}
    return timm.create_model("vit_tiny_patch16_224", **kind).eval()


@pytest.fixture
def model(vit):
    yield vit
    patch.remove(vit)


def counts(model):
    return {layer: step.lengths for layer, step in patch.reductions(model).items()}


@torch.inference_mode()
def test_is_taken_where_no_method_is_named_and_falls_geometrically_to_the_budget(model):
    images = torch.randn(2, 3, 128, 128)
    patch.apply(model, tokens=0.5)(images)
    assert patch.method(model) == "keymatch"
    assert counts(model) == {2: (215,) * 2, 3: (181,) * 2, 4: (152,) * 2, 6: (128,) * 2}  # of 256: 256 · 2^(-i/4)
    patch.apply(patch.remove(model), tokens=[250, 200], layers=[5, 9])(images)
    assert counts(model) == {5: (250,) * 2, 9: (200,) * 2}


@pytest.mark.parametrize(
    ("depth", "layers"), [(1, (1,)), (2, (2,)), (6, (2, 3)), (12, (2, 3, 4, 6)), (24, (4, 6, 8, 12))]
)
def test_default_layers_scale_with_the_depth_and_leave_out_the_first(depth, layers):
    assert patch.check("keymatch", depth, (16, 16))["layers"] == layers


@torch.inference_mode()
def test_half_of_an_odd_number_of_tokens_is_the_larger_half():
    """What a layer can leave; the images need not have the grid that the model was made for."""
    kind = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "num_heads": 2,
        "num_classes": 0,
        "dynamic_img_size": True,
    }
    for depth, tokens in ((1, 0.5), (3, 0.5), (3, [0.5]), (12, 0.0625)):
        model = timm.create_model("vit_tiny_patch16_224", depth=depth, **kind).eval()
        patch.apply(model, tokens=tokens)
        for side in (32, 40, 56, 72):
            model(torch.randn(1, 3, side, side))
            assert abs(patch.reduction(model).lengths[0] - (side // 8) ** 2 * (0.0625 if depth == 12 else 0.5)) <= 1
    with pytest.raises(ValueError, match="can leave 13 to 25 of 25 tokens, not 12"):
        patch.check("keymatch", 3, (5, 5), tokens=12)


@torch.inference_mode()
@pytest.mark.parametrize("metric", ["keys", "queries", "values", "tokens"])
@pytest.mark.parametrize("center", [True, False])
def test_compares_what_it_is_told_to(model, metric, center):
    images, seen, block = torch.randn(2, 3, 128, 128), {}, model.blocks[1]
    hooks = [
        block.attn.qkv.register_forward_hook(lambda module, args, output: seen.update(qkv=output)),
        block.norm2.register_forward_pre_hook(lambda module, args: seen.update(tokens=args[0])),
    ]
    model(images)
    for hook in hooks:
        hook.remove()
    query, key, value = seen["qkv"].unflatten(-1, (3, 2, 16)).unbind(2)
    vectors = {"keys": key.mean(2), "queries": query.mean(2), "values": value.mean(2), "tokens": seen["tokens"]}[metric]
    patches = vectors[:, 1:]
    patches = patches - patches.mean(1, keepdim=True) if center else patches
    patch.apply(model, layers=[2], tokens=200, metric=metric, center=center)(images)
    assert torch.equal(
        patch.reduction(model).assignment, g2tm.bipartite(patches, tokens=200, keep_order=True).assignment
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0.05}, r"a layer of keymatch can leave 128 to 256 of 256 tokens, not 12\d; .*more slowly, or more"),
        ({"tokens": [200, 100]}, "one for each of the 4 merging layers"),
        ({"tokens": [200, 210], "layers": [2, 3]}, "can leave 100 to 200 of 200 tokens, not 210"),
        ({"tokens": 300}, "from 1 to 256"),
        ({"metric": "attention"}, "choose keys or queries or values or tokens"),
    ],
)
def test_refuses_budgets_that_no_matching_reaches(model, options, message):
    with pytest.raises(ValueError, match=message):
        patch.apply(model, **options)
