"""Automatic and tuned thresholds."""

import json

import pytest
import torch
from click.testing import CliRunner

import patch
from segm import auto_threshold, tune_threshold
from segm.checkpoint import read_variant, save_checkpoint
from segm.data import create_dataset
from segm.eval.runs import square_view
from segm.model.factory import create_segmenter
from segm.tune_threshold import lowest_without_loss

SIZE = 32


@pytest.fixture
def run(shapes_run):
    return shapes_run


def call(command, *arguments):
    result = CliRunner().invoke(command.main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_automatic_thresholds_are_mean_plus_std_over_all_pairs(run):
    """Against all pairs of all images, collected and then averaged."""
    found = auto_threshold.automatic_thresholds(run, "shapes", [1, 3], torch.device("cpu"), max_images=3)
    from segm.model.factory import load_model

    model, dataset = load_model(run)[0], create_dataset("shapes", "train")
    seen = []
    handle = model.encoder.blocks[2].norm2.register_forward_pre_hook(lambda m, i: seen.append(i[0][0, 1:]))
    with torch.inference_mode():
        for index in range(3):
            model(square_view(dataset[index].image, SIZE, "vit"))
    handle.remove()
    i, j = torch.triu_indices(16, 16, 1)
    units = [torch.nn.functional.normalize(tokens.double(), dim=-1) for tokens in seen]
    cosines = torch.cat([(unit @ unit.T)[i, j] for unit in units])
    assert set(found) == {1, 3}
    assert found[3].mean == pytest.approx(cosines.mean().item(), abs=1e-9)
    assert found[3].std == pytest.approx(cosines.std(correction=0).item(), abs=1e-9)
    assert found[3].threshold == pytest.approx(min(1, found[3].mean + found[3].std))


def test_auto_threshold_prints_a_line_per_layer(run):
    result = call(auto_threshold, run, "shapes", "--selected-layers", 1, 2, "--max-images", 2, "--device", "cpu")
    lines = result.stdout.splitlines()
    assert result.exit_code == 0 and [line.split()[0] for line in lines] == ["layer", "1", "2"]
    refused = call(auto_threshold, run, "shapes", "--selected-layers", 4, "--device", "cpu")
    assert refused.exit_code != 0 and "1 to 3" in refused.output
    refused = call(auto_threshold, run, "shapes", "--selected-layers", 2, 1, "--device", "cpu")
    assert refused.exit_code != 0 and "ascending" in refused.output


@pytest.mark.parametrize("method", ["graph", "algm"])
def test_tuning_measures_once_and_goes_on_where_it_stopped(run, tmp_path, monkeypatch, method):
    options = [run, "shapes", "--patch-type", method, "--selected-layers", 1, "--max-images", 2, "--device", "cpu"]
    options += ["--highest", 1.0, "--lowest", 0.8, "--step", 0.1, "--out", tmp_path / "tuned"]
    monkeypatch.setattr(tune_threshold, "COST_IMAGES", 1)
    scored, real = [], tune_threshold.evaluate

    def evaluate(model, *rest, **options):
        scored.append(patch.settings(model)["threshold"] if patch.is_patched(model) else None)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return real(model, *rest, **options)

    monkeypatch.setattr(tune_threshold, "evaluate", evaluate)
    assert call(tune_threshold, *options).exit_code != 0
    assert call(tune_threshold, *options).exit_code == 0
    assert scored == [None, 1.0, 0.9, 0.9, 0.8]
    rows = json.loads((tmp_path / "tuned/results.json").read_text())["rows"]
    assert [row["threshold"] for row in rows] == [None, 1.0, 0.9, 0.8]
    assert rows[0]["tokens"] == 16 and rows[0]["mean_iou"] == pytest.approx(rows[1]["mean_iou"], abs=0.02)
    assert rows[1]["tokens"] >= rows[2]["tokens"] >= rows[3]["tokens"]
    assert all(row["images_per_second"] > 0 for row in rows)
    assert (tmp_path / "tuned/curves.png").stat().st_size > 1000
    other = call(tune_threshold, *options, "--prop-attn")
    assert other.exit_code != 0 and "other settings" in other.output
    save_checkpoint({"model": create_segmenter(read_variant(run)["net_kwargs"]).state_dict()}, run / "checkpoint.pth")
    other = call(tune_threshold, *options)
    assert other.exit_code != 0 and "another checkpoint" in other.output
    (tmp_path / "tuned/results.json").write_text("{}")
    damaged = call(tune_threshold, *options)
    assert damaged.exit_code != 0 and "holds no measurements" in damaged.output


def test_tuning_wants_a_threshold_to_tune(run):
    for options in ([], ["--patch-type", "tome"]):
        result = call(tune_threshold, run, "shapes", "--device", "cpu", *options)
        assert result.exit_code != 0 and "graph, algm" in result.output
    fixed = call(tune_threshold, run, "shapes", "--device", "cpu", "--patch-type", "graph", "--threshold", 0.9)
    assert fixed.exit_code != 0 and "--highest" in fixed.output
    turned = call(tune_threshold, run, "shapes", "--device", "cpu", "--patch-type", "graph", "--lowest", -2)
    assert turned.exit_code != 0 and "-1 <= lowest" in turned.output


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [((1.0, 0.8, 0.1), [1.0, 0.9, 0.8]), ((0.82, 0.76, 0.1), [0.82, 0.76]), ((0.9, 0.9, 0.02), [0.9])],
)
def test_thresholds_end_at_the_lowest(bounds, expected):
    assert tune_threshold.falling(*bounds) == pytest.approx(expected)


@pytest.mark.parametrize(("scores", "lowest"), [([60, 59, 58], None), ([60, 61, 60, 59, 62], 0.8), ([60, 60, 61], 0.8)])
def test_lowest_threshold_without_loss(scores, lowest):
    thresholds = [None, 0.9, 0.8, 0.7, 0.6]
    rows = [{"threshold": t, "mean_iou": s} for t, s in zip(thresholds, scores, strict=False)]
    assert lowest_without_loss(rows) == lowest
