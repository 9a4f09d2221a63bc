"""Methods that leave a smaller grid: where patches come back, rotary embeddings, refusals."""

import pytest
import timm
import torch

import patch
from segm.model.factory import create_segmenter
from tests.families import FAMILIES
from tests.helpers import different_images

GRIDS = {"expedit": {"layers": [1], "cluster_grid": (2, 3)}, "cubist": {"layers": [2], "remove": (1, 2)}}
PLACES = (2, "before_norm", "after_norm", "decoder", "none")


@pytest.mark.parametrize("method", GRIDS)
@torch.inference_mode()
def test_a_segmenter_restores_at_every_place(method, small_net):
    model = create_segmenter(small_net).eval()
    images = different_images(3)
    plain, keys, found = model(images), [*model.state_dict()], {}
    for place in PLACES:
        patch.apply(model, method, restore_at=place, **GRIDS[method])
        found[place] = model(images)
        assert found[place].shape == plain.shape and [*model.state_dict()] == keys
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(found[place], alone, atol=1e-5, rtol=1e-5)
        step = patch.reduction(model)
        grid = step.grid
        assert step.lengths == (grid[0] * grid[1],) and step.width < 16
        patch.remove(model)
        assert torch.equal(model(images), plain)
    # A copy commutes with the norm, which acts on tokens by themselves; a mix does not.
    same = torch.allclose(found["before_norm"], found["after_norm"], atol=1e-5)
    assert same == (method != "expedit")


@pytest.mark.parametrize("method", GRIDS)
@torch.inference_mode()
def test_without_a_way_back_the_map_is_enlarged(method, small_net):
    model, images = create_segmenter(small_net).eval(), different_images(2)
    patch.apply(model, method, restore_at="none", **GRIDS[method])
    scores = model.grid_logits(images)
    tokens = []
    handle = model.decoder.register_forward_hook(lambda module, inputs, output: tokens.append(output))
    model.grid_logits(images)
    handle.remove()
    grid = patch.reduction(model).grid
    assert tokens[0].shape[1] == grid[0] * grid[1]
    small = tokens[0].unflatten(1, grid).permute(0, 3, 1, 2)
    torch.testing.assert_close(scores, torch.nn.functional.interpolate(small, (4, 4), mode="bilinear"))


@pytest.mark.parametrize("method", GRIDS)
@torch.inference_mode()
def test_later_blocks_have_all_patches(method, small_net):
    """Behind the block of `restore_at`."""
    model, lengths = create_segmenter(small_net).eval(), []
    patch.apply(model, method, restore_at=2, **GRIDS[method])
    for block in [*model.encoder.blocks, *model.decoder.blocks]:
        block.mlp.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    model(different_images(2))
    prefix, few = model.encoder.num_prefix_tokens, patch.reduction(model).width
    assert lengths[1] == prefix + few and lengths[2] == prefix + 16 and lengths[3] > 16


ROTARY = ("eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224")


@pytest.mark.parametrize("method", GRIDS)
@torch.inference_mode()
def test_rotary_embeddings_are_those_of_the_smaller_grid(method):
    """Against a model for so small an image, which gets the tokens that are left."""
    size = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    for name in ROTARY:
        torch.manual_seed(0)
        model = timm.create_model(name, img_size=(32, 48), **size).eval()
        patch.apply(model, method, restore_at="none", **GRIDS[method])
        kept = []
        model.blocks[1].register_forward_hook(lambda module, inputs, output, kept=kept: kept.append(output))
        found = model.forward_features(torch.randn(1, 3, 32, 48))
        grid = patch.reduction(model).grid
        small = timm.create_model(name, img_size=(8 * grid[0], 8 * grid[1]), **size).eval()
        weights = {key: value for key, value in model.state_dict().items() if "pos_embed" not in key}
        small.load_state_dict(weights, strict=False)
        table = small._pos_embed(small.patch_embed(torch.zeros(1, 3, 8 * grid[0], 8 * grid[1])))[1]
        x = small.blocks[2](kept[0], rope=table[2] if table.ndim == 4 else table)
        torch.testing.assert_close(found, small.norm(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", GRIDS)
def test_open_families_restore_inside(method):
    for kind in ("Dinov2", "DINOv3ViT"):
        model, images = FAMILIES[kind].build(), different_images(2)
        for place in ("after_norm", "none"):
            with pytest.raises(ValueError, match=f"restore_at '{place}'.*before_norm, or the number of a block"):
                patch.apply(model, method, restore_at=place, **GRIDS[method])
        for place in ("before_norm", 2):
            patch.apply(model, method, restore_at=place, **GRIDS[method])
            FAMILIES[kind].run(model, images)
            assert patch.reduction(model).grid is not None
            patch.remove(model)


def test_options_that_do_not_fit():
    for method, given, message in (
        ("expedit", {"layers": [3, 5]}, "expedit clusters once: give one layer"),
        (
            "expedit",
            {"layers": [6], "restore_at": 5},
            "restore_at 5: give the number of a block from 6 to 12, or a word",
        ),
        ("expedit", {"restore_at": 13}, "restore_at 13"),
        ("expedit", {"cluster_grid": (5, 4)}, "clusters 5×4: give rows and columns from 1×1 to the grid's 4×4"),
        ("expedit", {"cluster_window": 2}, "window 2: give an odd number"),
        ("expedit", {"neighbors": 0}, "neighbors 0: give a number of tokens from 1, or -1 for all"),
        ("cubist", {"remove": (1, -1)}, "remove .*give 2 values, each a number from 0|remove .*give a number from 0"),
        ("cubist", {"remove": (1, 1.5)}, "give numbers of rows and columns, or shares of them from 0 to 1"),
        ("cubist", {"tokens": 3}, "tokens 3: one merge keeps at least 2×2 of 4×4 patches"),
        ("cubist", {"layers": [2, 4], "tokens": [8]}, "give one number, or one for each of the 2 merging layers"),
        (
            "cubist",
            {"layers": [2, 4], "restore_at": 3},
            "restore_at 3: give the number of a block from 4 to 12, or a word",
        ),
        ("expedit", {"tokens": 17}, "tokens 17: give a number from 1 to 16"),
    ):
        with pytest.raises(ValueError, match=message):
            patch.check(method, 12, (4, 4), **given)


@pytest.mark.parametrize("method", GRIDS)
def test_one_token_less_than_patches_is_restored_too(method):
    """S + 1 = P, with CLS in front."""
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=(16, 8), patch_size=8, embed_dim=32, num_heads=2, depth=3
    )
    grid = {"expedit": {"cluster_grid": (1, 1)}, "cubist": {"remove": (1, 0)}}[method]
    patch.apply(model.eval(), method, **GRIDS[method] | grid)
    assert model.forward_features(torch.randn(1, 3, 16, 8)).shape == (1, 3, 32)
    assert patch.reduction(model).width == 1


@pytest.mark.parametrize("method", GRIDS)
def test_gradients_reach_all_images(method, small_net):
    images = different_images(2).requires_grad_()
    for place in PLACES:
        model = patch.apply(create_segmenter(small_net).train(), method, restore_at=place, **GRIDS[method])
        (gradient,) = torch.autograd.grad(model(images).square().sum(), images)
        assert gradient.isfinite().all() and (gradient.abs().amax((1, 2, 3)) > 0).all()


@torch.inference_mode()
def test_rectangles_shrink_layer_by_layer(small_net):
    model, images = create_segmenter(small_net).eval(), different_images(2)
    for given, grids in (
        ({"remove": (1, 0)}, [(3, 4), (2, 4)]),
        ({"remove": (0.5, 0.25)}, [(2, 3), (1, 2)]),
        ({"tokens": [12, 6]}, [(3, 4), (2, 3)]),
        ({"tokens": 0.5}, [(3, 2), (3, 2)]),
    ):
        patch.apply(model, "cubist", layers=[1, 3], **given)
        together = model(images)
        assert [step.grid for step in patch.reductions(model).values()] == grids
        assert patch.reduction(model).sizes.sum(1).tolist() == [16, 16]
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        patch.remove(model)


@torch.inference_mode()
def test_the_table_of_the_whole_grid_is_the_models_own():
    for kind in ("vit", "eva", "Dinov2", "DINOv3ViT"):
        family, images = FAMILIES[kind], different_images(2)
        model = family.build()
        plain = family.run(model, images)
        patch.apply(model, "cubist", remove=(0, 0))
        torch.testing.assert_close(family.run(model, images), plain, atol=1e-5, rtol=1e-5)
        assert patch.reduction(model).grid is not None
