"""The results on a real model, in small: every step writes its table, and measures nothing twice."""

import importlib
import json
import shutil
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import nn

import patch
from segm.merging import mean_tokens
from segm.model import linear
from segm.model.factory import create_segmenter
from segm.run import Run
from tests.helpers import run_here

SCRIPTS = Path(__file__).parents[2] / "scripts"
SHORT = ["--batch-size", "16", "--num-workers", "0", "--epochs", "1"]
FROM_RUN = ["--finetune", "{work}/start", *SHORT]


@pytest.fixture
def script(monkeypatch, few_shapes, shapes_run, tmp_path):
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
        "FROZEN_RUN": "tuned",
        "FRONTIER": {"tome": (0.5,)},
        "EQUAL": {"tome": (0.5,)},
        "VIEWS": 1,
        "COST_IMAGES": 1,
        "N_SIMILAR": 2,
        "N_PICTURES": 1,
        "PURE_OF": ("graph", "tome"),
        "ABLATIONS": {"graph": [{"layers": [2]}, {"attention": "inverse"}]},
        "AUTO_LAYERS": [1],
        "TRAINED": {"tome": 0.5},
        "LONGER": SHORT,
        "DECODER_ALONE": [*SHORT, "--freeze-encoder"],
        "CROPS_FIRST": {"clustvit": [*FROM_RUN, "--patch-type", "clustvit", "--injection-point", "2"]},
        "HEADS": {"clustvit": ["--finetune", "{work}/clustvit_crops", *SHORT]},
    }
    monkeypatch.setattr("subprocess.run", run_here)
    for name, value in small.items():
        monkeypatch.setattr(module, name, value)
    (tmp_path / "work").mkdir()
    shutil.copytree(shapes_run, tmp_path / "work/start")
    yield module
    for name in ("results", "tokens", "speed", "classification"):
        sys.modules.pop(f"real_{name}", None)
    for name in ("compare_methods", "results_file", "tradeoff"):
        sys.modules.pop(name, None)


def rows_in(folder, question, study):
    """The rows of the only entry of a study, and all of them of several heads."""
    entries = json.loads((folder / f"{question}.json").read_text())
    (entry,) = (one for one in entries if one["id"] == f"{study}-1")
    assert not any(one["id"] == f"{study}-2" for one in entries)
    return entry["rows"]


@pytest.mark.nightly
def test_every_step_writes_its_table_once(script, tmp_path, call, monkeypatch):
    options = ["--work", tmp_path / "work", "--out", tmp_path / "out", "--max-images", 2, "--device", "cpu"]
    text = call(script, *options)
    out = tmp_path / "out"
    (model,) = rows_in(out, "quality", "models")
    assert model["epochs"] == 1 and 0 <= model["val"]["mean_iou"] <= 100
    rows = rows_in(out, "methods", "methods")
    assert {row["method"] for row in rows} == {"pure", "graph", "tome", "fpet"}
    assert {row["im_size"] for row in rows} > {None} and {row["patch_size"] for row in rows} > {None}
    assert all(row["boundary_iou"] >= 0 and row["images_per_second"] > 0 for row in rows)
    sizes = {(row["im_size"], row["method"]) for row in rows_in(out, "size", "frontier")}
    assert sizes == {(size, method) for size in (24, 32) for method in ("pure", "tome")}
    assert [row["layer"] for row in rows_in(out, "quality", "tokens")] == [1, 2, 3]
    assert [row["method"] for row in rows_in(out, "quality", "purity")] == ["graph", "tome"]
    for name in ("models", "tokens", "methods", "heads", "frontier"):
        assert (tmp_path / "work" / f"{name}.md").stat().st_size > 50
    for name in ("similarities", "methods_time", "frontier_boundary_iou"):
        assert (out / "pictures" / f"{name}.png").stat().st_size > 50
    assert "| tome | " in text and "| smaller image | " in text

    monkeypatch.setattr(script, "TRAININGS", script.TRAININGS)
    monkeypatch.setattr("trainings.subprocess.run", None)  # would fail: nothing is trained again
    monkeypatch.setattr("tradeoff.compare", None)  # nor measured
    assert call(script, *options, "--steps", "methods,frontier")
    assert rows_in(out, "methods", "methods") == rows


def test_a_step_without_its_models_says_which_step_trains_them(script, tmp_path, refused):
    options = ["--work", tmp_path / "work", "--out", tmp_path / "out", "--device", "cpu", "--steps", "methods"]
    assert "--steps models" in refused(script, *options) and not (tmp_path / "out").exists()


def test_second_trainings_go_on_with_the_decoder_of_the_first(monkeypatch):
    """A run says which method it was trained with, but `train.py` asks anew for the decoder."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("real_results")

    def decoder(options):
        return dict(pairwise(options)).get("--decoder")

    assert all(decoder(first) == decoder(module.HEADS[name]) for name, first in module.CROPS_FIRST.items())


def test_shares_over_thresholds_are_those_of_graph_merging(script, shapes_run):
    run = Run.load(shapes_run, device="cpu")
    dataset, _ = run.open()
    samples = [dataset[0], dataset[1]]
    pairs = script.similarities(run, samples, [1, 2])
    for layer in (1, 2):
        for threshold in (0.5, 0.9, 0.97):
            merged = run.with_settings("graph", {"layers": [layer], "threshold": threshold})
            for sample, pair in zip(samples, pairs[layer], strict=True):
                kept = mean_tokens(merged.model, [merged.preprocess_resized(sample.image)]) / 16
                assert script.kept_share(*pair, threshold) == kept


def test_groups_are_as_pure_as_their_pixels_say(script, shapes_run):
    """By counting, pixel by pixel, what a map with one label per group gets right."""
    run = Run.load(shapes_run, device="cpu", patch_type="graph", layers=[1], threshold=0.9)
    dataset, _ = run.open()
    sample = dataset[0]
    found = script.purity(run, [sample])
    run.model.grid_logits(run.preprocess_resized(sample.image))
    groups = patch.reduction(run.model).assignment[0].view(4, 4).numpy().repeat(8, 0).repeat(8, 1)
    right, total, held = Counter(), Counter(), []
    for group in np.unique(groups):
        labels = Counter(sample.label[groups == group].tolist())
        best, _ = min(labels.items(), key=lambda one: (-one[1], one[0]))
        right[best] += labels[best]
        total += labels
        if (groups == group).sum() > 64:
            held.append(len(labels))
    assert found["tokens"] == len(np.unique(groups))
    assert found["pure"] == {run.classes[c]: pytest.approx(100 * right[c] / total[c]) for c in sorted(total)}
    assert found["labels_per_group"] == pytest.approx(np.mean(held) if held else 1)


def test_plain_pytorch_gives_the_labels_of_the_run(script, shapes_run):
    speed, run = sys.modules["real_speed"], Run.load(shapes_run, device="cpu")
    rng = np.random.default_rng(0)
    for size in ((60, 90), (24, 100), (80, 40)):
        photo = cv2.resize(rng.integers(0, 255, (6, 8, 3), dtype=np.uint8), size[::-1])
        with torch.inference_mode():
            found = speed.plain_predict(run, photo).numpy()
        assert found.shape == size and (found == run.predict(photo)).mean() > 0.99


def test_all_precisions_are_measured(script, shapes_run, monkeypatch):
    speed, run = sys.modules["real_speed"], Run.load(shapes_run, device="cpu")
    monkeypatch.setattr(speed, "PHOTOS", {"small": (32, 40)})
    monkeypatch.setattr(speed, "usable_dtypes", lambda: speed.DTYPES)
    merged = run.with_settings("graph", {"layers": [1], "threshold": 0.9})
    rows = speed.measure_speed({"ours": run, "merged": merged}, np.zeros((20, 30, 3), np.uint8), 2)
    names = [("plain PyTorch", "float32"), *((name, dtype) for dtype in speed.DTYPES for name in ("ours", "merged"))]
    assert [(row["name"], row["dtype"]) for row in rows] == names
    assert all(row["small"] > 0 for row in rows) and rows[1]["mean_iou"] == rows[0]["mean_iou"]


def test_linear_layers_are_quantized_whatever_multiplies_them(script, small_net, monkeypatch):
    monkeypatch.setattr(linear, "mkl_lacks_avx512", lambda: True)
    model = create_segmenter(small_net).eval()
    n_layers = sum(isinstance(module, nn.Linear) for module in model.modules())
    quantized = sys.modules["real_speed"].InDtype(model, torch.qint8)
    kinds = [type(module) for module in quantized.modules()]
    assert kinds.count(torch.ao.nn.quantized.dynamic.Linear) == n_layers
    assert {type(module) for module in model.modules() if isinstance(module, nn.Linear)} == {linear.OneDNNLinear}


def test_neighbors_vote_by_their_similarity(script):
    classification = sys.modules["real_classification"]
    angles = torch.tensor([0.0, 0.1, 0.2, 3.0, 3.1])
    known = torch.stack([angles.cos(), angles.sin()], 1)
    asked = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 0, 1, 2, 2])
    assert classification.knn_accuracy(known, labels, asked, torch.tensor([0, 2])) == 100
    assert classification.knn_accuracy(known, labels, asked, torch.tensor([1, 2])) == 50
