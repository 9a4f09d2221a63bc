"""Classification with merged tokens: what the command measures, on which images, and what it refuses."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import timm
import torch

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
            name, pretrained_cfg_overlay={"input_size": (3, 32, 32)}, **TINY | {"num_classes": 6} | more
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


def test_several_methods_are_in_one_table(script, photographs, tmp_path, call, refused):
    out, pictures = tmp_path / "found.json", tmp_path / "pictures"
    several = ["--compare", "tome,pitome --variant paper,pure", "--merge-num", "7"]
    written = call(script, *COMMON, photographs, *several, "--out", out, "--pictures", pictures, "--n-pictures", "1")
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["pure", "tome", "pitome --variant paper"]
    assert [row["tokens"] for row in rows] == [16, 9, 9] and "| pitome --variant paper |" in written
    assert {folder.name for folder in pictures.iterdir()} == {"tome", "pitome_--variant_paper"}
    assert "no given number" in refused(script, *COMMON, photographs, "--compare", "tome,graph", "--merge-num", "7")


@pytest.mark.slow
def test_processes_share_the_images(script, photographs, tmp_path, call):
    """Two processes score what one scores, and one of them prints."""
    alone, shared = tmp_path / "alone.json", tmp_path / "shared.json"
    torch.save(timm.create_model(COMMON[0]).state_dict(), tmp_path / "tiny.pth")
    more = f"pretrained_cfg_overlay={{'input_size': (3, 32, 32)}}, **{TINY}"
    start = "import runpy, timm\nreal = timm.create_model\n"
    start += f"timm.create_model = lambda name, **given: real(name, {more} | given)\n"
    (tmp_path / "start.py").write_text(f"{start}runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")
    options = ["--checkpoint", tmp_path / "tiny.pth", "--patch-type", "tome", "--r", "1", "--num-workers", "0"]
    common = [*map(str, [COMMON[0], photographs, *options]), "--device", "cpu", "--out"]
    call(script, *common, alone)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    run = [*torchrun, str(tmp_path / "start.py"), *common, str(shared)]
    found = subprocess.run(run, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.count("| tome |") == 1, found.stderr
    rows = [json.loads(file.read_text())["rows"] for file in (alone, shared)]
    for key in ("top1", "top5", "tokens"):
        assert [row[key] for row in rows[0]] == [row[key] for row in rows[1]]


def test_noise_is_scored_by_what_the_plain_model_says(script, call):
    table = call(script, *COMMON, "--synthetic", "5", "--patch-type", "graph", "--threshold", "1")
    assert "| pure | 100.00 | 100.00 |" in table and "| graph | 100.00 | 100.00 |" in table  # nothing merges


def test_own_classes_are_as_many_as_the_weights_have(script, photographs, tmp_path, call):
    for folder in "2345":
        shutil.rmtree(photographs / folder)
    torch.save(timm.create_model(COMMON[0], num_classes=2).state_dict(), tmp_path / "two.pth")
    given = [COMMON[0], *COMMON[2:], photographs, "--checkpoint", tmp_path / "two.pth", "--patch-type", "tome"]
    assert "| tome |" in call(script, *given)


def test_the_pictures_of_a_hybrid_have_its_grid(script, tmp_path, call, monkeypatch):
    """Its patch embedding counts pixels of the feature map that a convolution makes."""
    hybrid = timm.create_model("vit_tiny_r_s16_p8_224", img_size=64, patch_size=4, num_classes=6)
    monkeypatch.setattr(timm, "create_model", lambda name, **more: hybrid)
    monkeypatch.setitem(hybrid.pretrained_cfg, "input_size", (3, 64, 64))
    call(script, *COMMON, "--synthetic", "1", "--patch-type", "graph", "--pictures", tmp_path / "pictures")
    (picture,) = (tmp_path / "pictures").iterdir()
    assert cv2.imread(str(picture)).shape == (64, 64, 3)


def test_a_name_of_a_hub_is_one(script, refused, monkeypatch):
    def no_network(name, **more):
        raise OSError(f"no way to {name}")

    monkeypatch.setattr(timm, "create_model", no_network)
    said = refused(script, "hf-hub:someone/model", "--synthetic", "1")
    assert "cannot fetch the weights of hf-hub:someone/model" in said


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
    assert "timm knows no such model" in refused(script, "nosuch", photographs)


def test_totals_are_spread_over_the_layers(script):
    for total in (0, 5, 98, 100):
        for inflection in (-1, -0.5, 0, 0.5, 1):
            schedule = script.total_schedule(total, inflection, 12)
            assert sum(schedule) == total and min(schedule) >= 0 and len(schedule) == 12
    with pytest.raises(ValueError, match="from -1 to 1"):
        script.total_schedule(5, 2, 12)
