"""Classification with merged tokens: what the command measures, on which images, and what it refuses."""

import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm

SCRIPT = Path(__file__).parents[2] / "scripts/eval_classification.py"
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


@pytest.fixture
def script(monkeypatch):
    """The script, with a tiny ViT of six classes in place of any other."""
    spec = importlib.util.spec_from_file_location("eval_classification", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    real = timm.create_model
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, **more: real(
            name, num_classes=6, pretrained_cfg_overlay={"input_size": (3, 32, 32)}, **TINY | more
        ),
    )
    return module


@pytest.fixture
def photographs(tmp_path):
    for index in range(6):
        (tmp_path / f"images/{index}").mkdir(parents=True)
        picture = np.random.default_rng(index).integers(0, 256, (5, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
        cv2.imwrite(str(tmp_path / f"images/{index}/a.png"), picture)
    return tmp_path / "images"


COMMON = ["deit_tiny_patch16_224", "--no-pretrained", "--device", "cpu", "--num-workers", "0"]


def test_a_folder_is_scored_with_and_without_merging(script, photographs, tmp_path, call):
    out, pictures = tmp_path / "found.json", tmp_path / "pictures"
    merging = ["--patch-type", "tome", "--merge-num", "7", "--inflect", "-1"]
    written = call(script, *COMMON, photographs, *merging, "--out", out, "--pictures", pictures, "--n-pictures", "2")
    pure, merged = json.loads(out.read_text())["rows"]
    assert (pure["tokens"], merged["tokens"]) == (16, 9) and merged["gflops"] < pure["gflops"]
    assert 0 <= merged["top1"] <= merged["top5"] <= 100 and "| tome |" in written
    assert json.loads(out.read_text())["merging"] == {"method": "tome", "r": script.total_schedule(7, -1, 4)}
    assert sorted(file.name for file in pictures.iterdir()) == ["00000_9_tokens.png", "00001_9_tokens.png"]
    assert cv2.imread(str(pictures / "00000_9_tokens.png")).shape == (32, 32, 3)


def test_noise_is_scored_by_what_the_plain_model_says(script, call):
    table = call(script, *COMMON, "--synthetic", "5", "--patch-type", "graph", "--threshold", "1")
    assert "| pure | 100.00 | 100.00 |" in table and "| graph | 100.00 | 100.00 |" in table  # nothing merges


def test_what_it_cannot_do_is_refused(script, photographs, tmp_path, refused):
    (tmp_path / "few/one").mkdir(parents=True)
    for given, allowed in (
        ([], "--synthetic N"),
        ([photographs, "--synthetic", "2"], "--synthetic N"),
        ([tmp_path / "few"], "1 folders for 6 classes"),
        ([photographs, "--patch-type", "graph", "--merge-num", "3"], "graph removes no given number"),
        ([photographs, "--patch-type", "tome", "--merge-num", "3", "--r", "2"], "choose one"),
        ([photographs, "--checkpoint", SCRIPT], "no weights of deit_tiny"),
    ):
        assert allowed in refused(script, *COMMON, *given), given
    assert "unknown model" in refused(script, "nosuch", photographs)


def test_totals_are_spread_over_the_layers(script):
    for total in (0, 5, 98, 100):
        for inflection in (-1, -0.5, 0, 0.5, 1):
            schedule = script.total_schedule(total, inflection, 12)
            assert sum(schedule) == total and min(schedule) >= 0 and len(schedule) == 12
    with pytest.raises(ValueError, match="from -1 to 1"):
        script.total_schedule(5, 2, 12)
