"""The benchmark: what it measures adds up, and a missed target is told."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import patch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark

    yield benchmark
    for name in ("benchmark", "results_file"):
        del sys.modules[name]


def rows_in(folder, question):
    """The rows of the only entry of a question."""
    (entry,) = json.loads((folder / f"{question}.json").read_text())
    assert entry["machine"] == "M1" and entry["torch"] == torch.__version__
    return entry["rows"]


def row_of(**changed):
    row = {"model": "T", "side": 512, "n_cls": 150, "batch_size": 1, "dtype": "float32", "method": "graph"}
    return row | {"tokens": 690, "n_patches": 1024, "share_scores": 0.95, "overhead": {2: 0.005}} | changed


CASES = [
    ({}, "cpu", 0),
    ({"share_scores": 0.94}, "cpu", 1),
    ({"share_scores": 0.94, "tokens": 410}, "cpu", 1),
    ({"share_scores": 0.94, "tokens": 300}, "cpu", 0),  # away from the reference points
    ({"share_scores": 0.94, "model": "S", "batch_size": 8}, "cpu", 1),
    ({"share_scores": 0.94, "model": "L"}, "cpu", 0),
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
]


def test_targets(benchmark):
    for changed, device, missed in CASES:
        assert len(benchmark.missed_targets(row_of(**changed), device)) == missed, (changed, device)


@pytest.mark.nightly
def test_the_command_writes_rows_and_fails_where_a_target_is_missed(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "missed_targets", lambda row, device: [f"{row['method']} is too slow"])
    options = ["--models", "T", "--sides", "64", "--methods", "graph,tome", "--batches", "1", "--repeats", "1"]
    options += ["--device", "cpu", "--n-cls", "5", "--out", str(tmp_path)]
    passed = CliRunner().invoke(benchmark.main, options)
    assert passed.exit_code == 0, passed.output
    assert [row["method"] for row in rows_in(tmp_path, "time")] == ["graph", "tome"]
    assert "| T | 64 | 1 | float32 | graph | " in passed.output
    failed = CliRunner().invoke(benchmark.main, [*options, "--check"])
    assert failed.exit_code == 1 and "tome is too slow" in failed.output
    assert [entry["id"] for entry in json.loads((tmp_path / "time.json").read_text())] == ["benchmark-1", "benchmark-2"]


@pytest.fixture
def plain_backend(monkeypatch):
    """Traces without generating code, which would take a compiler and half a minute."""
    monkeypatch.setattr(patch, "compile", partial(patch.compile, backend="eager"))
    yield
    torch._dynamo.reset()


@pytest.mark.nightly
def test_compiled_models_get_columns_of_their_own(benchmark, plain_backend, tmp_path):
    options = ["--models", "T", "--sides", "64", "--methods", "graph", "--batches", "1", "--repeats", "1", "--compile"]
    options += ["--device", "cpu", "--n-cls", "5", "--out", str(tmp_path)]
    passed = CliRunner().invoke(benchmark.main, options)
    assert passed.exit_code == 0, passed.output
    (row,) = rows_in(tmp_path, "time")
    assert row["scores_compiled_pure"] > 0
    assert row["ratio_compiled"] > 0 and row["ratio_compiled_pure"] > 0
    assert "compiled to eager pure, pure → merged |" in passed.output


def test_wrong_values_are_refused(benchmark):
    for *options, allowed in (
        ("--models", "X", "T, S, B, L"),
        ("--sides", "a", "1,8"),
        ("--methods", "none", "graph, algm, mpm"),
    ):
        result = CliRunner().invoke(benchmark.main, options)
        assert result.exit_code != 0 and allowed in result.output


@pytest.mark.nightly
def test_a_budget_is_kept_to_the_token(benchmark, tmp_path):
    options = ["--models", "T", "--sides", "64", "--methods", "graph,tome", "--batches", "1", "--repeats", "1"]
    options += ["--device", "cpu", "--n-cls", "5", "--tokens", "0.25", "--budget", "--out", str(tmp_path)]
    passed = CliRunner().invoke(benchmark.main, options)
    assert passed.exit_code == 0, passed.output
    graph, tome = rows_in(tmp_path, "time")
    assert graph["tokens"] == 4 and graph["settings"]["tokens"] and tome["settings"]["r"]


@pytest.mark.parametrize("options", [[], ["--amp"]])
def test_training_is_timed_interleaved(benchmark, tmp_path, options):
    import benchmark_training

    arguments = ["--model", "T", "--side", "32", "--n-cls", "11", "--batch-size", "2", "--updates", "1"]
    arguments += ["--rounds", "1", "--num-workers", "0", "--methods", "graph,dtem", "--device", "cpu"]
    arguments += ["--out", str(tmp_path)]
    result = CliRunner().invoke(benchmark_training.main, [*arguments, *options])
    assert result.exit_code == 0, result.output
    pure, graph, dtem = rows_in(tmp_path, "training")
    assert pure["ratio"] == 1 and pure["tokens"] is None and 0 < graph["tokens"] <= 4 and dtem["ratio"] > 0
    assert 0 < graph["data_wait"] < 100 and "| graph | " in result.output
    del sys.modules["benchmark_training"]


def test_the_scale_of_a_merge(benchmark, tmp_path):
    import benchmark_scale

    options = ["--grids", "8,16", "--width", "32", "--repeats", "1", "--device", "cpu", "--out"]
    options.append(str(tmp_path))
    result = CliRunner().invoke(benchmark_scale.main, options)
    assert result.exit_code == 0, result.output
    for row in rows_in(tmp_path, "training"):
        assert row["microseconds_per_patch"] > 0
        if row["method"] != "ToMe" and row["patches"] == 256:  # five eighths of the tokens
            assert row["tokens"] == pytest.approx(160, abs=25)
    assert (tmp_path / "pictures/scale.png").stat().st_size > 1000
    del sys.modules["benchmark_scale"]
