"""Costs of one method in one model: parts that add up, and options that keep a wanted number of tokens."""

from copy import deepcopy

import pytest
import torch
from equal_cost import KNOBS, gflops, options_for, tokens_left
from method_cost import Merges, eager_label_map, measure, products_alone, ratio_interval, with_free_merges
from operator_times import profile_merges, profile_passes

import patch
from segm.eval.cost import Cost
from segm.merging import build_model, count_tokens
from segm.model import linear
from segm.model.factory import create_segmenter

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


def test_the_interval_of_a_ratio_holds_the_true_one_about_as_often_as_it_says():
    """Noisy trials of two models, one twice as fast, 100 times; more trials narrow it, without noise it is a point."""
    generator = torch.Generator().manual_seed(0)

    def intervals(trials):
        noise = (0.1 * torch.randn(100, 2, trials, generator=generator, dtype=torch.float64)).exp()
        return [ratio_interval(2 * one, torch.ones(2, trials)) for one in noise]

    def width(found):
        return sum(high - low for low, high in found) / len(found)

    found = intervals(16)
    assert 85 <= sum(low <= 2 <= high for low, high in found) <= 99
    assert width(intervals(64)) == pytest.approx(width(found) / 2, rel=0.2)
    assert ratio_interval(torch.full((2, 4), 2.0), torch.ones(2, 4)) == (2, 2)


def test_options_leave_the_wanted_tokens_or_operations(model, batches):
    for name, fixed in {"graph": {}, "algm": {"layers": [1, 2]}, "tome": {}, "dtem": {}, "random": {}}.items():
        options = options_for(model, name, batches, 30, **fixed)
        assert fixed.items() <= options.items() and options.keys() - fixed == {KNOBS[name][0]}
        assert tokens_left(patch.apply(deepcopy(model), name, **options), batches) == pytest.approx(30, abs=6), name
    wanted = 0.8 * gflops(model, batches)
    merged = patch.apply(deepcopy(model), "tome", **options_for(model, "tome", batches, wanted, gflops))
    assert gflops(merged, batches) == pytest.approx(wanted, rel=0.1)
    assert options_for(model, "mpm", batches, 30) == {} and not patch.is_patched(model)


def test_nearer_than_a_thousandth_is_near_enough(model, batches):
    tried = []

    def cost_of(merged, _):
        tried.append(patch.options(merged)["threshold"])
        return 100 * tried[-1]

    assert options_for(model, "graph", batches, 25, cost_of) == {"threshold": 0.25} and len(tried) < 10


@torch.inference_mode()
def test_with_free_merges_a_pass_gives_the_same_scores(model, batches):
    for name in METHODS:
        merged = merging(model, name)
        expected = [merged.grid_logits(batch) for batch in batches]
        recorded = {batch.data_ptr(): Merges.record(merged, batch) for batch in batches}
        assert [*recorded[batches[0].data_ptr()].steps] == [*patch.options(merged)["layers"]]
        merges = recorded[batches[0].data_ptr()]
        assert merges.total.counts.tolist() == count_tokens(merged, batches[0]).tolist()
        with with_free_merges(merged, recorded) as grid_logits:
            for batch, scores in zip(batches, expected, strict=True):
                torch.testing.assert_close(grid_logits(batch), scores)
            with pytest.raises(KeyError):
                grid_logits(batches[0].clone())  # that was not recorded


@torch.inference_mode()
def test_a_row_holds_together(model, batches):
    for name in ("graph", "dct", "dtem"):
        row = measure(model, name, METHODS[name], batches, CPU, 1)
        assert row["n_patches"] == 64 and 0 < row["tokens"] <= 64
        assert row["saving"] == pytest.approx(row["gflops_pure"] / row["gflops"])
        assert row["share_scores"] == pytest.approx(row["ratio_scores"] / row["saving"])
        assert row["share_scores_low"] <= row["share_scores"] <= row["share_scores_high"]
        assert [*row["overhead"]] == [*row["settings"]["layers"]] and all(one > 0 for one in row["overhead"].values())
        assert row["memory_scores_mib"] is None or row["memory_scores_mib"] >= 0
        assert not patch.is_patched(model)


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

    monkeypatch.setattr("method_cost.products_alone", noted)
    measure(model, "graph", METHODS["graph"], batches[:1], CPU, repeats=1)
    assert found and not any(found)


@pytest.fixture
def onednn(monkeypatch):
    """A processor on which oneDNN multiplies the linear layers."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("PyTorch was built without oneDNN")
    monkeypatch.setattr(linear, "mkl_lacks_avx512", lambda: True)


def by_onednn(call, *args):
    """How many linear layers it computes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call(*args)
    return sum(event.count for event in profiler.key_averages() if event.key == "mkldnn::_linear_pointwise")


@torch.inference_mode()
def test_the_eager_label_map_has_pytorchs_layers(onednn, small_net):
    model, images = create_segmenter(small_net).eval(), torch.randn(2, 3, 64, 64)
    assert by_onednn(model.predict, images) > by_onednn(eager_label_map(model), images) == 0


def test_products_alone_are_those_of_onednn(onednn, small_net):
    model, images = create_segmenter(small_net).eval(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        repeat = products_alone(model.network, images)
        assert by_onednn(repeat) == by_onednn(model.network, images) > 0
