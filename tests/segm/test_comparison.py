"""Models compared inside one run: tokens, operations and speed against their references."""

from copy import deepcopy

import pytest
import torch

import patch
from segm.eval.cost import Cost, compare
from segm.merging import build_model
from tests.helpers import by_speed

CPU = torch.device("cpu")
METHODS = {
    "graph": {"threshold": 0.1},
    "algm": {"layers": [1, 2], "threshold": 0.1},
    "tome": {"r": 4},
    "keymatch": {"layers": [2]},
    "tofu": {"r": 4},
    "dct": {"r": 4},
    "dtem": {"r": 4},
    "mpm": {"layers": [2]},
}


@pytest.fixture(scope="module")
def net():
    """Settings of a model for 8 x 8 patches."""
    net = {"backbone": "vit_tiny_patch16_384", "image_size": [64, 64], "patch_size": 8, "d_model": 32, "n_heads": 2}
    return net | {"n_layers": 3, "n_cls": 5, "decoder": {"name": "mask_transformer", "n_layers": 1, "dropout": 0.0}}


@pytest.fixture
def model(net):
    """With the learned parts of DTEM, which only DTEM uses."""
    return build_model(net | {"reduction": {"name": "dtem"}}).eval()


@pytest.fixture
def batches():
    return [torch.randn(2, 3, 64, 64) * scale for scale in (0.3, 1.0)]


def merging(model, name):
    return patch.apply(deepcopy(model), name, **METHODS[name])


@pytest.mark.parametrize("name", by_speed(METHODS, quick=["graph"], slow=["dct"]))
def test_costs_are_means_over_images(model, batches, name):
    pure = Cost.of(model, batches)
    assert pure.counts == (64,) * 4 and pure.network < pure.total
    merged = merging(model, name)
    cost = Cost.of(merged, batches)
    alone = [Cost.of(merged, [batch]) for batch in batches]
    assert cost.total == pytest.approx(sum(one.total for one in alone) / 2), name
    assert cost.counts == alone[0].counts + alone[1].counts and cost.tokens < 64
    if name != "dct":  # its own matrix products may cost more than they save in so small a model
        assert cost.decoder < pure.decoder


@pytest.mark.slow
def test_models_are_compared_with_their_references(model, batches):
    models = {"pure": model, "graph": merging(model, "graph"), "dct": merging(model, "dct")}
    rows = compare(models, {"graph": "pure", "dct": "pure"}, dict.fromkeys(models, batches), CPU)
    assert [*rows] == ["graph", "dct"]
    for name, row in rows.items():
        assert (row["reference"], row["n_patches"], len(row["counts"])) == ("pure", 64, 4)
        assert row["tokens"] == sum(row["counts"]) / 4 and row["realized_share"] > 0
        assert row["gflops"] == pytest.approx(Cost.of(models[name], batches).total)
        assert row["images_per_second"] > 0 and row["images_per_second_scores"] > 0
    assert compare({"pure": model}, {"pure": "pure"}, {"pure": batches}, CPU)["pure"]["realized_share"] == 1
