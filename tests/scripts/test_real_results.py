"""The results on a real model, in small: every step writes its table, and measures nothing twice."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"
FROM_RUN = ["--finetune", "{work}/start", "--batch-size", "250", "--num-workers", "0", "--epochs", "1"]


@pytest.fixture
def script(monkeypatch, shapes_run, tmp_path):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("real_results")
    small = {
        "DATASET": "shapes",
        "SMALL": ("car", "tree"),
        "SPLITS": ("val", "train"),
        "TRAININGS": {"tuned": [*FROM_RUN, "--freeze-encoder", "--cache-features", "1"]},
        "FIXED": ("fpet",),
        "NO_TRAINING": ("graph", "tome"),
        "SHARES": (0.75, 0.5),
        "SIZES": (24, 32),
        "FRONTIER": {"tome": (0.5,)},
        "VIEWS": 1,
        "COST_IMAGES": 1,
    }
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    (tmp_path / "work").mkdir()
    shutil.copytree(shapes_run, tmp_path / "work/start")
    yield module
    for name in ("real_results", "compare_methods"):
        sys.modules.pop(name, None)


def test_every_step_writes_its_table_once(script, tmp_path, call, monkeypatch):
    options = ["--work", tmp_path / "work", "--out", tmp_path / "out", "--max-images", 2, "--device", "cpu"]
    text = call(script, *options)
    out = tmp_path / "out"
    (model,) = json.loads((out / "models.json").read_text())["rows"]
    assert model["epochs"] == 1 and 0 <= model["val"]["mean_iou"] <= 100
    rows = json.loads((out / "methods.json").read_text())["rows"]
    assert {row["method"] for row in rows} == {"pure", "graph", "tome", "fpet"}
    assert {row["im_size"] for row in rows} > {None} and {row["patch_size"] for row in rows} > {None}
    assert all(row["boundary_iou"] >= 0 and row["images_per_second"] > 0 for row in rows)
    sizes = {(row["im_size"], row["method"]) for row in json.loads((out / "frontier.json").read_text())["rows"]}
    assert sizes == {(size, method) for size in (24, 32) for method in ("pure", "tome")}
    for name in ("models.md", "methods.md", "frontier.md", "methods_time.png", "frontier_boundary_iou.png"):
        assert (out / name).stat().st_size > 50
    assert "| tome | " in text and "| smaller image | " in text

    monkeypatch.setattr(script, "TRAININGS", script.TRAININGS)
    monkeypatch.setattr(script.subprocess, "run", None)  # would fail: nothing is trained again
    monkeypatch.setattr("segm.tradeoff.compare", None)  # nor measured
    assert call(script, *options, "--steps", "methods,frontier")
