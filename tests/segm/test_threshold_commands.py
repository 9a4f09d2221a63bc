"""Automatic and tuned thresholds."""

import json

import pytest
import torch

from segm import auto_threshold, tune_threshold
from segm.checkpoint import save_checkpoint
from segm.data import create_dataset
from segm.data.images import resized_view
from segm.model.factory import create_segmenter, load_model
from segm.run import Run
from segm.tune_threshold import lowest_without_loss
from tests.helpers import read_variant

SIZE = 32
CPU = ["--device", "cpu"]


@pytest.fixture
def run(shapes_run, monkeypatch):
    """What is tuned is timed on all images, of which there are few."""
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 6, "val": 2})
    return shapes_run


def test_automatic_thresholds_are_mean_plus_std_over_all_pairs(run):
    """Against all pairs of three images spread over the data, collected and then averaged."""
    found = auto_threshold.automatic_thresholds(run, "shapes", [1, 3], torch.device("cpu"), max_images=3)
    model, dataset = load_model(run)[0], create_dataset("shapes", "train")
    seen = []
    handle = model.encoder.blocks[2].norm2.register_forward_pre_hook(lambda m, i: seen.append(i[0][0, 1:]))
    with torch.inference_mode():
        for index in (0, len(dataset) // 3, 2 * len(dataset) // 3):
            model(resized_view(dataset[index].image, SIZE, "vit"))
    handle.remove()
    i, j = torch.triu_indices(16, 16, 1)
    units = [torch.nn.functional.normalize(tokens.double(), dim=-1) for tokens in seen]
    cosines = torch.cat([(unit @ unit.T)[i, j] for unit in units])
    assert set(found) == {1, 3}
    assert found[3].mean == pytest.approx(cosines.mean().item(), abs=1e-9)
    assert found[3].std == pytest.approx(cosines.std(correction=0).item(), abs=1e-9)
    assert found[3].threshold == pytest.approx(min(1, found[3].mean + found[3].std))


def test_auto_threshold_prints_a_line_per_layer(run, call, refused):
    lines = call(auto_threshold, run, "shapes", "--selected-layers", 1, 2, "--max-images", 2, *CPU).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "1", "2"]
    assert "1 to 3" in refused(auto_threshold, run, "shapes", "--selected-layers", 4, *CPU)
    assert "ascending" in refused(auto_threshold, run, "shapes", "--selected-layers", 2, 1, *CPU)


@pytest.mark.slow
def test_tuning_measures_once_and_goes_on_where_it_stopped(run, tmp_path, monkeypatch, call, refused):
    scored, real = [], Run.evaluate

    def evaluate(run, *rest, **options):
        scored.append(run.options.get("threshold"))
        if len(scored) == 3:
            raise ValueError("interrupted")
        return real(run, *rest, **options)

    monkeypatch.setattr(Run, "evaluate", evaluate)
    for method in ("graph", "algm"):
        scored.clear()
        out = tmp_path / method
        options = [run, "shapes", "--patch-type", method, "--selected-layers", 1, "--max-images", 2, *CPU, "--out", out]
        options += ["--highest", 1.0, "--lowest", 0.8, "--step", 0.1]
        assert "interrupted" in refused(tune_threshold, *options)
        call(tune_threshold, *options)
        assert scored == [None, 1.0, 0.9, 0.9, 0.8]
        rows = json.loads((out / "results.json").read_text())["rows"]
        assert [row["options"].get("threshold") for row in rows] == [None, 1.0, 0.9, 0.8]
        assert rows[0]["tokens"] == 16 and rows[0]["mean_iou"] == pytest.approx(rows[1]["mean_iou"], abs=0.02)
        assert rows[1]["tokens"] >= rows[2]["tokens"] >= rows[3]["tokens"]
        assert all(row["images_per_second"] > 0 for row in rows)
        assert (out / "curves.png").stat().st_size > 1000
        assert "other settings" in refused(tune_threshold, *options, "--prop-attn")
    weights = create_segmenter(read_variant(run)["net_kwargs"]).state_dict()
    save_checkpoint({"model": weights}, run / "checkpoint.pth")
    assert "another checkpoint" in refused(tune_threshold, *options)
    (out / "results.json").write_text("{}")
    assert "holds no measurements" in refused(tune_threshold, *options)


@pytest.mark.slow
def test_tuning_over_image_sizes_names_the_best_setting_at_a_speed(run, tmp_path, call):
    options = [run, "shapes", "--patch-type", "graph", "--selected-layers", 1, "--max-images", 2, *CPU]
    options += ["--im-size", 32, 16, "--highest", 0.9, "--lowest", 0.8, "--step", 0.1, "--out", tmp_path]
    text = call(tune_threshold, *options, "--images-per-second", 1)
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [(row["im_size"], row["options"].get("threshold")) for row in rows] == [
        (size, threshold) for size in (32, 16) for threshold in (None, 0.9, 0.8)
    ]
    assert [row["n_patches"] for row in rows] == [16] * 3 + [4] * 3
    best = max(rows, key=lambda row: (row["mean_iou"], row["images_per_second"]))
    assert f"at least 1 images/s: --im-size {best['im_size']} --patch-type {best['method']}" in text
    assert ("on the hull" in text and "without loss at 16 pixels" in text) or "unpatched model at 16 pixels" in text
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert "nothing reaches 1e+07" in call(tune_threshold, *options, "--images-per-second", 1e7)


def test_tuning_wants_a_threshold_to_tune(run, refused):
    for options in ([], ["--patch-type", "tome"]):
        assert "graph, algm" in refused(tune_threshold, run, "shapes", *CPU, *options)
    graph = [run, "shapes", *CPU, "--patch-type", "graph"]
    assert "--highest" in refused(tune_threshold, *graph, "--threshold", 0.9)
    assert "-1 <= lowest" in refused(tune_threshold, *graph, "--lowest", -2)


def test_thresholds_end_at_the_lowest():
    for bounds, expected in (
        ((1.0, 0.8, 0.1), [1.0, 0.9, 0.8]),
        ((0.82, 0.76, 0.1), [0.82, 0.76]),
        ((0.9, 0.9, 0.02), [0.9]),
    ):
        assert tune_threshold.falling(*bounds) == pytest.approx(expected)


def test_lowest_threshold_without_loss():
    thresholds = [None, 0.9, 0.8, 0.7, 0.6]
    for scores, lowest in (([60, 59, 58], None), ([60, 61, 60, 59, 62], 0.8), ([60, 60, 61], 0.8)):
        rows = [{"options": {"threshold": t}, "mean_iou": s} for t, s in zip(thresholds, scores, strict=False)]
        assert lowest_without_loss(rows) == lowest
