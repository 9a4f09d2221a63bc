"""The benchmark: what it measures adds up, and a missed target is told."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import patch
from segm.model.factory import create_segmenter

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark

    yield benchmark
    del sys.modules["benchmark"], sys.modules["benchmarking"], sys.modules["result_tables"]


@pytest.fixture
def measuring(benchmark):
    return sys.modules["benchmarking"]


@pytest.fixture
def model(small_net):
    return create_segmenter(small_net | {"image_size": [64, 64]}).eval()


@pytest.fixture
def batches():
    return [torch.randn(2, 3, 64, 64) * scale for scale in (0.3, 1.0)]


@pytest.mark.parametrize("method", ["graph", "algm"])
def test_the_threshold_keeps_about_the_wanted_tokens(measuring, model, batches, method):
    layers = {"layers": [1, 2]} if method == "algm" else {}
    options = measuring.settings_for(model, method, batches, 30, **layers)
    patch.segmenter(model, method, **options)
    with torch.inference_mode():
        kept = [count for batch in batches for count in measuring.count_tokens(model, batch).tolist()]
    assert sum(kept) / len(kept) == pytest.approx(30, abs=6)


def test_speeds_and_ratios_are_those_of_all_batches_together(measuring):
    """Two batches that plain execution takes 1 s for, and merged 0.5 s and 0.25 s; in the last turn all is slower."""
    plain = torch.tensor([[1.0, 1.0, 0.1], [1.0, 1.0, 0.1]])
    merged = plain * torch.tensor([[2.0], [4.0]])
    assert measuring.speed(plain) == pytest.approx(1) and measuring.speed(merged) == pytest.approx(2 / 0.75)
    assert measuring.ratio(merged, plain) == pytest.approx(2 / 0.75)
    assert measuring.share_of_time(plain, merged) == pytest.approx(0.375)


def test_the_profile_tells_where_merging_spends_its_time(measuring, model, batches):
    found = measuring.profile_merges(model, "tome", {"r": 4}, batches[0], torch.device("cpu"), repeats=2)
    assert sum(row["share"] for row in found) == pytest.approx(1)
    assert [row["share"] for row in found] == sorted((row["share"] for row in found), reverse=True)
    calls = {row["operator"]: row["calls"] for row in found}
    assert calls["aten::bmm"] == 3 and calls["aten::argsort"] == 3  # one per layer
    assert "outside" in calls and not patch.is_patched(model)


@torch.inference_mode()
def test_a_replayed_pass_gives_the_same_scores_for_free(measuring, model, batches):
    patch.segmenter(model, "tome", r=4)
    recorded = {batch.data_ptr(): measuring.Merges.record(model, batch) for batch in batches}
    assert list(recorded[batches[0].data_ptr()].steps) == [1, 2, 3]
    grid_scores = measuring.replaying(model, recorded)
    model.merging.method = None  # the copy has its own
    for batch in batches:
        steps = recorded[batch.data_ptr()].steps
        scores = grid_scores(batch)
        assert scores.shape == (2, 5, 8, 8) and steps[1][0].x.shape[1] == 64
    twin = create_segmenter_like(model)
    torch.testing.assert_close(scores, patch.segmenter(twin, "tome", r=4).grid_scores(batch))


def create_segmenter_like(model):
    """An unpatched model with the same weights."""
    settings = {
        "backbone": "vit_tiny_patch16_384",
        "image_size": [64, 64],
        "patch_size": 8,
        "d_model": 32,
        "n_heads": 2,
    }
    decoder = {"name": "mask_transformer", "n_layers": 1, "dropout": 0.0}
    twin = create_segmenter(settings | {"n_layers": 3, "n_cls": 5, "decoder": decoder}).eval()
    twin.load_state_dict(model.state_dict())
    return twin


@torch.inference_mode()
def test_a_row_holds_together(measuring, model, batches):
    row = measuring.measure(model, "graph", {"threshold": 0.5}, batches, torch.device("cpu"), 2)
    assert row["n_patches"] == 64 and 0 < row["tokens"] <= 64
    assert row["saving"] == pytest.approx(row["gflops_pure"] / row["gflops"])
    assert row["share_scores"] == pytest.approx(row["ratio_scores"] / row["saving"])
    assert set(row["overhead"]) == {2} and row["overhead"][2] > 0
    assert not patch.is_patched(model)


def test_the_eager_label_map_is_the_models_own(measuring, model, batches):
    with torch.inference_mode():
        assert torch.equal(measuring.eager_label_map(model)(batches[0]), model.predict(batches[0]))


def row_of(**changed):
    row = {"model": "T", "side": 512, "n_cls": 150, "batch_size": 1, "dtype": "float32", "method": "graph"}
    return row | {"tokens": 690, "n_patches": 1024, "share_scores": 0.95, "overhead": {2: 0.005}} | changed


@pytest.mark.parametrize(
    ("changed", "device", "missed"),
    [
        ({}, "cpu", 0),
        ({"share_scores": 0.89}, "cpu", 1),
        ({"share_scores": 0.89, "tokens": 300}, "cpu", 0),  # away from the reference point
        ({"share_scores": 0.91, "model": "S", "batch_size": 8}, "cpu", 1),
        ({"overhead": {2: 0.02}}, "cpu", 1),
        ({"overhead": {1: 0.005, 5: 0.02}, "method": "algm"}, "cpu", 0),  # the target is CLAP's
        ({"overhead": dict.fromkeys(range(1, 13), 0.006), "method": "tome", "share_scores": 0.5}, "cpu", 1),
        ({"overhead": {2: 0.02}}, "cuda", 0),
        ({"share_scores": 0.94, "dtype": "bfloat16", "batch_size": 32}, "cuda", 1),
        ({"ratio_compiled": 2.9, "dtype": "bfloat16"}, "cuda", 1),
        ({"ratio_compiled": 3.1, "dtype": "bfloat16"}, "cuda", 0),
        ({"ratio_compiled": 2.9, "dtype": "bfloat16"}, "cpu", 0),
        ({"ratio_compiled": 2.9, "dtype": "float32"}, "cuda", 0),
        ({"ratio_compiled": 2.9, "dtype": "bfloat16", "model": "L"}, "cuda", 0),
    ],
)
def test_targets(benchmark, changed, device, missed):
    assert len(benchmark.missed_targets(row_of(**changed), device)) == missed


def test_the_command_writes_rows_and_fails_where_a_target_is_missed(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "missed_targets", lambda row, device: [f"{row['method']} is too slow"])
    options = ["--models", "T", "--sides", "64", "--methods", "graph,tome", "--batches", "1", "--repeats", "1"]
    options += ["--device", "cpu", "--n-cls", "5", "--out", str(tmp_path / "rows.json")]
    passed = CliRunner().invoke(benchmark.main, options)
    assert passed.exit_code == 0, passed.output
    assert [row["method"] for row in json.loads((tmp_path / "rows.json").read_text())["rows"]] == ["graph", "tome"]
    assert "| T | 64 | 1 | float32 | graph | " in passed.output
    failed = CliRunner().invoke(benchmark.main, [*options, "--check"])
    assert failed.exit_code == 1 and "tome is too slow" in failed.output


@pytest.fixture
def plain_backend(monkeypatch):
    """Traces without generating code, which would take a compiler and half a minute."""
    monkeypatch.setattr(patch, "compile", partial(patch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.slow
def test_compiled_models_get_columns_of_their_own(benchmark, plain_backend, tmp_path):
    options = ["--models", "T", "--sides", "64", "--methods", "graph", "--batches", "1", "--repeats", "1", "--compile"]
    options += ["--device", "cpu", "--n-cls", "5", "--out", str(tmp_path / "rows.json")]
    passed = CliRunner().invoke(benchmark.main, options)
    assert passed.exit_code == 0, passed.output
    (row,) = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert row["scores_compiled_pure"] > 0
    assert row["ratio_compiled"] > 0 and row["ratio_compiled_pure"] > 0
    assert "compiled to eager pure, pure → merged |" in passed.output


@pytest.mark.parametrize(
    ("options", "allowed"),
    [(["--models", "X"], "T, S, B, L"), (["--sides", "a"], "1,8"), (["--methods", "none"], "graph, algm, tome")],
)
def test_wrong_values_are_refused(benchmark, options, allowed):
    result = CliRunner().invoke(benchmark.main, options)
    assert result.exit_code != 0 and allowed in result.output


@pytest.mark.parametrize("options", [[], ["--amp"]])
def test_training_is_timed_in_turns(benchmark, tmp_path, options):
    import benchmark_training

    arguments = [
        "--model",
        "T",
        "--side",
        "32",
        "--n-cls",
        "11",
        "--batch-size",
        "2",
        "--updates",
        "1",
        "--rounds",
        "1",
    ]
    arguments += ["--num-workers", "0", "--methods", "graph", "--device", "cpu", "--out", str(tmp_path / "rows.json")]
    result = CliRunner().invoke(benchmark_training.main, [*arguments, *options])
    assert result.exit_code == 0, result.output
    pure, graph = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert pure["ratio"] == 1 and pure["tokens"] is None and 0 < graph["tokens"] <= 4
    assert 0 < graph["data_wait"] < 100 and "| graph | " in result.output
    del sys.modules["benchmark_training"]


def test_the_scale_of_a_merge(benchmark, tmp_path):
    import benchmark_scale

    options = [
        "--grids",
        "8,16",
        "--width",
        "32",
        "--repeats",
        "1",
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "scale"),
    ]
    result = CliRunner().invoke(benchmark_scale.main, options)
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "scale.json").read_text())["rows"]
    for row in rows:
        assert row["microseconds_per_patch"] > 0
        if row["method"] != "ToMe" and row["patches"] == 256:  # five eighths of the tokens
            assert row["tokens"] == pytest.approx(160, abs=25)
    assert (tmp_path / "scale.png").stat().st_size > 1000
    del sys.modules["benchmark_scale"]
