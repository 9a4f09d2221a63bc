"""Curves over the threshold: what is measured, kept and refused."""

import importlib
import json
import sys
from pathlib import Path

import cv2
import pytest

from segm.auto_threshold import automatic_thresholds
from segm.merging import mean_tokens
from segm.run import Run

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def script(monkeypatch, few_shapes):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("threshold_curves")
    for name in ("threshold_curves", "tradeoff"):
        sys.modules.pop(name)


def costs(models, references, batches, device):
    """In place of `compare`, which times: the tokens of its models."""
    return {
        name: {"tokens": mean_tokens(models[name], batches[name]), "images_per_second": 1.0 + number}
        for number, name in enumerate(references)
    }


def test_runs_are_measured_over_their_thresholds_once(script, shapes_run, tmp_path, call, monkeypatch):
    texts = [f"graph={shapes_run} --patch-type graph --selected-layer 2", f"CLAP={shapes_run} --patch-type algm"]
    texts[1] += " --selected-layers 1 3 --gbm-threshold 1"
    options = ["shapes", *texts, "--thresholds", 1, 0.2, 0.8, "--max-images", 2, "--cost-images", 1]
    options += ["--auto-images", 3, "--out", tmp_path / "work", "--device", "cpu"]
    monkeypatch.setattr("tradeoff.compare", costs)
    printed = call(script, *options)
    rows = json.loads((tmp_path / "work/thresholds.json").read_text())
    assert [row["name"] for row in rows] == ["graph"] * 4 + ["CLAP"] * 4
    run = Run.load(shapes_run, device="cpu")
    for layer, own in ((2, rows[:4]), (1, rows[4:])):
        auto = automatic_thresholds(shapes_run, "shapes", [layer], run.device, 3)[layer].threshold
        (marked,) = (row["threshold"] for row in own if row["automatic"])
        assert marked == pytest.approx(auto, abs=1e-4) and f"{marked:g} (automatic)" in printed
        assert [row["threshold"] for row in own] == [None, *sorted([0.2, 1, marked])]
        assert own[0]["tokens"] == own[-1]["tokens"] == 16 > own[1]["tokens"]
        for row in own:
            setting = run if row["threshold"] is None else run.with_settings(row["method"], row["options"])
            assert row["mean_iou"] == setting.evaluate(n_images=2)["mean_iou"]
    assert cv2.imread(str(tmp_path / "work/thresholds.png")).std() > 0
    monkeypatch.setattr("tradeoff.compare", None)  # would fail: nothing is measured again
    assert call(script, *options) == printed


def test_runs_without_a_threshold_are_refused(script, shapes_run, tmp_path, refused):
    for merging in ("", "--patch-type tome --r 2", "--patch-type graph --tokens 9"):
        text = f"mine={shapes_run} {merging}"
        found = refused(script, "shapes", text, "--out", tmp_path / "work", "--device", "cpu")
        assert "mine merges with" in found and "without a threshold" in found
    text = f"mine={shapes_run} --patch-type graph"
    bounds = ["--thresholds", 0.5, 0.9, 0.1, "--out", tmp_path / "work"]
    assert "highest >= lowest" in refused(script, "shapes", text, *bounds)
    assert not (tmp_path / "work").exists()
