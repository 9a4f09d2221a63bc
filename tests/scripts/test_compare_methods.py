"""The comparison of all methods at the same operations: what it sets, measures, keeps and takes up again."""

import importlib
import json
import sys
from pathlib import Path

import pytest

import patch
from tests.helpers import run_here

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch, few_shapes):
    monkeypatch.setattr("subprocess.run", run_here)
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("compare_methods")
    for name in ("compare_methods", "results_file"):
        sys.modules.pop(name)


def test_every_method_is_compared(script):
    assert set(script.KNOBS) | set(script.FIXED) == set(patch.METHODS)
    for method, (name, *_) in script.KNOBS.items():
        assert patch.find(method).takes(name) and script.FLAGS[name].startswith("--")


@pytest.mark.nightly
def test_methods_cost_what_they_are_to_cost_and_rows_are_kept(script, shapes_run, tmp_path, call, monkeypatch):
    options = ["--share", "0.8", "--epochs", "0", "--max-images", "2", "--cost-images", "1", "--device", "cpu"]
    options += ["--work", tmp_path / "work", "--out", tmp_path / "found"]
    names = "random,tome,smaller image,coarser patch,fpet"
    table = call(script, shapes_run, "shapes", *options, "--methods", names)
    (entry,) = json.loads((tmp_path / "found/methods.json").read_text())
    rows = entry["rows"]
    assert [row["method"] for row in rows] == ["pure", *names.split(",")]
    pure, *others = rows
    for row in others[:4]:
        assert 0.6 * pure["gflops"] < row["gflops"] < 0.95 * pure["gflops"] and row["images_per_second"] > 0
    assert others[0]["gflops"] == pytest.approx(0.8 * pure["gflops"], rel=0.05)
    assert (
        others[2]["options"]["im_size"] < 32
        and others[3]["options"]["patch_size"] > 8
        and "| random | tokens 0." in table
    )
    assert entry["plain"] == str(shapes_run) and entry["epochs"] == 0

    monkeypatch.setattr(script, "options_for", None)  # would fail: what is known is not looked for again
    call(script, shapes_run, "shapes", *options, "--methods", names)


@pytest.mark.nightly
def test_methods_are_trained_with_the_real_command(script, shapes_run, tmp_path, call):
    options = ["--share", "0.8", "--epochs", "1", "--max-images", "2", "--cost-images", "1", "--device", "cpu"]
    options += ["--work", tmp_path / "work", "--out", tmp_path / "found", "--methods", "dtem,coarser patch"]
    call(script, shapes_run, "shapes", *options, "--train-options", "--batch-size 4 --num-workers 0")
    (entry,) = json.loads((tmp_path / "found/methods.json").read_text())
    (_, row, coarser) = entry["rows"]
    assert "applied" not in row and row["trained"] >= 0 and (tmp_path / "work/dtem_0.8/checkpoint.pth").is_file()
    assert coarser["applied"] >= 0 and coarser["trained"] >= 0
