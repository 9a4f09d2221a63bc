"""What models are compared by: one formula, settings that keep a wanted number of tokens, and parts that add up."""

from copy import deepcopy

import pytest
import torch

import patch
from segm.eval.comparison import (
    Cost,
    Merges,
    compare,
    count_tokens,
    eager_label_map,
    mean_tokens,
    measure,
    ratio,
    ratio_interval,
    realised_share,
    replaying,
    settings_for,
    share_of_time,
    speed,
)
from segm.eval.products import products_alone
from segm.eval.profiling import profile_merges, profile_passes
from segm.merging import build_model
from tests.helpers import by_speed

CPU = torch.device("cpu")
METHODS = {
    "graph": {"threshold": 0.1},
    "algm": {"layers": [1, 2], "threshold": 0.1},
    "tome": {"r": 4},
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


def test_speeds_and_ratios_are_those_of_all_batches_together():
    """Two batches that plain execution takes 1 s for, and merged 0.5 s and 0.25 s; in the last turn all is slower."""
    plain = torch.tensor([[1.0, 1.0, 0.1], [1.0, 1.0, 0.1]])
    merged = plain * torch.tensor([[2.0], [4.0]])
    assert speed(plain) == pytest.approx(1) and speed(merged) == pytest.approx(2 / 0.75)
    assert ratio(merged, plain) == pytest.approx(2 / 0.75)
    assert share_of_time(plain, merged) == pytest.approx(0.375)


def test_the_realised_share_is_speed_gained_over_operations_saved():
    """Half the operations in 0.6 of the time: 1/0.6 of 2 is 0.83; and a model is worth itself."""
    pure = torch.tensor([[10.0, 20.0, 40.0]])
    assert realised_share(pure / 0.6, pure, 1.0, 2.0) == pytest.approx(1 / 1.2)
    assert realised_share(pure, pure, 2.0, 2.0) == 1
    slow = torch.tensor([[1.0, 1.0, 9.0]])  # the median over neighboring turns
    assert realised_share(slow, torch.ones(1, 3), 1.0, 2.0) == pytest.approx(0.5)


def test_the_interval_of_a_ratio_holds_the_true_one_about_as_often_as_it_says():
    """Noisy turns of two models, one twice as fast, 100 times; more turns tell it better, and no noise tells it all."""
    generator = torch.Generator().manual_seed(0)

    def intervals(turns):
        noise = (0.1 * torch.randn(100, 2, turns, generator=generator, dtype=torch.float64)).exp()
        return [ratio_interval(2 * one, torch.ones(2, turns)) for one in noise]

    def width(found):
        return sum(high - low for low, high in found) / len(found)

    found = intervals(16)
    assert 85 <= sum(low <= 2 <= high for low, high in found) <= 99
    assert width(intervals(64)) == pytest.approx(width(found) / 2, rel=0.2)
    assert ratio_interval(torch.full((2, 4), 2.0), torch.ones(2, 4)) == (2, 2)


def test_settings_keep_about_the_wanted_tokens(model, batches):
    for name in METHODS:
        layers = METHODS[name].get("layers")
        merged = patch.apply(deepcopy(model), name, **settings_for(model, name, batches, 30, layers))
        if name != "mpm":  # it has nothing to set
            assert mean_tokens(merged, batches) == pytest.approx(30, abs=6), name
    assert not patch.is_patched(model)


def test_a_budget_is_exact_where_a_method_has_one(model, batches):
    for name, method in patch.METHODS.items():
        if name in METHODS:
            layers = METHODS[name].get("layers")
            options = settings_for(model, name, batches, 30, layers, budget=True)
            assert ("tokens" in options) == method.takes("tokens")
            merged = patch.apply(deepcopy(model), name, **options)
            if method.takes("tokens"):
                assert all((count_tokens(merged, batch) == 30).all() for batch in batches), name


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


@torch.inference_mode()
def test_a_replayed_pass_gives_the_same_scores_for_free(model, batches):
    for name in METHODS:
        merged = merging(model, name)
        expected = [merged.grid_logits(batch) for batch in batches]
        recorded = {batch.data_ptr(): Merges.record(merged, batch) for batch in batches}
        assert [*recorded[batches[0].data_ptr()].steps] == [*patch.options(merged)["layers"]]
        merges = recorded[batches[0].data_ptr()]
        assert merges.total.counts.tolist() == count_tokens(merged, batches[0]).tolist()
        with replaying(merged, recorded) as grid_logits:
            for batch, scores in zip(batches, expected, strict=True):
                torch.testing.assert_close(grid_logits(batch), scores)
            with pytest.raises(KeyError):
                grid_logits(batches[0].clone())  # that was not recorded


@torch.inference_mode()
@pytest.mark.parametrize("name", by_speed(["graph", "dct", "dtem"], slow=["graph"]))
def test_a_row_holds_together(model, batches, name):
    row = measure(model, name, METHODS[name], batches, CPU, 1)
    assert row["n_patches"] == 64 and 0 < row["tokens"] <= 64
    assert row["saving"] == pytest.approx(row["gflops_pure"] / row["gflops"])
    assert row["share_scores"] == pytest.approx(row["ratio_scores"] / row["saving"])
    assert row["share_scores_low"] <= row["share_scores"] <= row["share_scores_high"]
    assert [*row["overhead"]] == [*row["settings"]["layers"]] and all(one > 0 for one in row["overhead"].values())
    assert row["memory_scores_mib"] is None or row["memory_scores_mib"] >= 0
    assert not patch.is_patched(model)


@pytest.mark.slow
def test_models_are_compared_with_their_references(model, batches):
    models = {"pure": model, "graph": merging(model, "graph"), "dct": merging(model, "dct")}
    rows = compare(models, {"graph": "pure", "dct": "pure"}, dict.fromkeys(models, batches), CPU)
    assert [*rows] == ["graph", "dct"]
    for name, row in rows.items():
        assert (row["reference"], row["n_patches"], len(row["counts"])) == ("pure", 64, 4)
        assert row["tokens"] == sum(row["counts"]) / 4 and row["realised_share"] > 0
        assert row["gflops"] == pytest.approx(Cost.of(models[name], batches).total)
        assert row["images_per_second"] > 0 and row["images_per_second_scores"] > 0
    assert compare({"pure": model}, {"pure": "pure"}, {"pure": batches}, CPU)["pure"]["realised_share"] == 1


def test_the_profile_tells_where_merging_spends_its_time(model, batches):
    found = profile_merges(model, "tome", {"r": 4}, batches[0], CPU, repeats=2)
    assert sum(row["share"] for row in found) == pytest.approx(1)
    assert [row["share"] for row in found] == sorted((row["share"] for row in found), reverse=True)
    assert "outside" in {row["operator"] for row in found} and any(row["calls"] >= 3 for row in found)  # 3 layers
    assert not patch.is_patched(model)


def test_the_profile_of_passes_tells_which_operators_gain(model, batches):
    found = profile_passes(model, "graph", METHODS["graph"], batches[0], CPU, repeats=2)
    assert [row["ms_pure"] for row in found] == sorted((row["ms_pure"] for row in found), reverse=True)
    by_name = {row["operator"]: row for row in found}
    assert by_name["aten::native_layer_norm"]["ms_pure"] > 0 and by_name["aten::native_layer_norm"]["ms"] > 0
    assert by_name["aten::scatter_add_"]["ms_pure"] == 0 < by_name["aten::scatter_add_"]["ms"]  # merging alone
    assert not patch.is_patched(model)


@torch.inference_mode()
def test_the_eager_label_map_is_the_models_own(model, batches):
    assert torch.equal(eager_label_map(model)(batches[0]), model.predict(batches[0]))


@torch.inference_mode()
def test_a_method_that_is_undone_in_the_encoder_is_measured_too(net, batches):
    model = build_model(net | {"reduction": {"name": "clustvit", "clusters": 2}}).eval()
    row = measure(model, "clustvit", {"layers": [1], "clusters": 2}, batches, CPU, repeats=1)
    assert 2 <= row["tokens"] < 64 and row["overhead"].keys() == {1} and row["overhead_undo"] > 0
    assert row["gflops_pure"] > row["gflops"] > 0
    merged = patch.apply(model, "clustvit", layers=[1], clusters=2)
    merged.grid_logits(batches[0])
    kept = patch.reductions(merged)[1].kept.sum().item()
    own = 32 * 129 // 32  # hidden width of the cluster module
    least = (64 * own * (32 + 3) + 3 * 32**2 * (64 - kept / 2)) / 1e9  # the modules' own work, per image
    assert Cost.of(merged, batches[:1]).encoder > least


@torch.inference_mode()
def test_products_are_repeated_with_the_weights_of_both_models(model, batches, monkeypatch):
    """Stand-ins, one for all layers of a shape, would stay in the caches."""
    found = []

    def noted(call, images):
        found.extend(weight.is_inference() for weight in call.__self__.parameters())
        return products_alone(call, images)

    monkeypatch.setattr("segm.eval.comparison.products_alone", noted)
    measure(model, "graph", METHODS["graph"], batches[:1], CPU, repeats=1)
    assert found and not any(found)
