"""The commands, end to end: a tiny training, its evaluation, and input that is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

import patch
from g2tm import Reduction
from patch import METHODS
from segm import (
    flops,
    inference,
    profile_model,
    show_attn_map,
    speedtest,
    test,
    token_stats,
    train,
    tune_threshold,
)
from segm.checkpoint import read_variant, write_variant
from segm.eval import miou

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
TINY = [
    *["--backbone", "vit_tiny_patch16_384", "--no-pretrained", "--num-workers", "0", "--device", "cpu"],
    *["--patch-size", "8", "--d-model", "32", "--n-heads", "2", "--n-layers", "2", "--batch-size", "2"],
    *["--im-size", "32", "--crop-size", "32", "--epochs", "2", "--learning-rate", "0.01"],
]


def invoke(command, arguments):
    """Run a command in this process; errors other than an exit are raised."""
    result = CliRunner().invoke(command.main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def call(command, *arguments):
    """Run a command that must succeed; returns what it prints on stdout."""
    result = invoke(command, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(command, *arguments):
    """The error message of a command that must fail: one line, no traceback."""
    result = invoke(command, arguments)
    assert result.exit_code != 0, result.output
    assert "Traceback" not in result.output and result.stderr.count("Error: ") == 1
    text = result.stderr[result.stderr.index("Error: ") :].strip()
    assert "\n" not in text, text
    return text


@pytest.fixture(scope="module")
def folder_data(tmp_path_factory):
    """The user's own data: six photographs with masks of three classes."""
    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            mask = rng.integers(0, 3, (5, 6), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            cv2.imwrite(str(root / f"images/{split}/{index}.jpg"), (mask * 90)[..., None].repeat(3, 2))
            cv2.imwrite(str(root / f"annotations/{split}/{index}.png"), mask)
    (root / "classes.yml").write_text(yaml.safe_dump(["floor", "wall", "door"]))
    return root


@pytest.fixture(scope="module")
def run(folder_data, tmp_path_factory):
    """A finished training with graph merging on the user's own data."""
    folder = tmp_path_factory.mktemp("runs") / "graph"
    with pytest.MonkeyPatch.context() as context:
        context.setenv("DATASET", str(folder_data))
        options = ["--patch-type", "graph", "--selected-layer", "1", "--threshold", "0.5", "--prop-attn"]
        call(train, "--log-dir", folder, "--dataset", "folder", *TINY, *options)
    return folder


@pytest.fixture(autouse=True)
def dataset_variable(monkeypatch, folder_data):
    monkeypatch.setenv("DATASET", str(folder_data))


def test_scores_agree_between_training_test_and_miou(run):
    last = json.loads((run / "log.txt").read_text().splitlines()[-1])
    printed = call(test, run, "--device", "cpu")
    assert f"mean_iou: {last['val_mean_iou']:.2f}" in printed
    call(miou, run, "folder", "--device", "cpu", "--save-images")
    scores = yaml.safe_load((run / "scores_ss.yml").read_text())
    assert scores["mean_iou"] == last["val_mean_iou"] and list(scores["per_class_iou"]) == ["floor", "wall", "door"]
    labels = cv2.imread(str(run / "images_ss/0.png"), cv2.IMREAD_UNCHANGED)
    assert labels.shape == (40, 48) and labels.max() < 3 and (run / "images_ss/0_blend.jpg").is_file()
    call(miou, run, "folder", "--device", "cpu", "--multiscale", "--frac-dataset", "0.5")
    assert (run / "scores_ms.yml").is_file()


def test_merging_comes_from_the_checkpoint_and_options_override_it(run, monkeypatch):
    seen = []
    monkeypatch.setattr("segm.options.patch.segmenter", lambda model, method, **options: seen.append((method, options)))
    call(test, run, "--device", "cpu")
    call(test, run, "--device", "cpu", "--threshold", "0.9", "--iprop-attn", "--batch-mode", "uniform")
    call(test, run, "--device", "cpu", "--selected-layers", "2")
    call(test, run, "--device", "cpu", "--patch-type", "pure")
    saved = {"layers": [1], "threshold": 0.5, "attention": "proportional", "batch": "ragged"}
    assert seen == [
        ("graph", saved),
        ("graph", saved | {"threshold": 0.9, "attention": "inverse", "batch": "uniform"}),
        ("graph", saved | {"layers": [2]}),
    ]


def test_photographs_without_labels(run, folder_data, tmp_path):
    output = call(inference, run, "-i", folder_data / "images/val", "-o", tmp_path / "out", "--device", "cpu")
    assert "2 photographs" in output
    for name in ("0", "1"):
        assert cv2.imread(str(tmp_path / f"out/{name}.png"), cv2.IMREAD_UNCHANGED).shape == (40, 48)
        assert cv2.imread(str(tmp_path / f"out/{name}_blend.jpg")).shape == (40, 48, 3)


def test_the_golden_checkpoint_runs_through_the_commands():
    assert "mean_iou" in call(test, DATA, "--max-images", "2", "--device", "cpu")
    merged = call(test, DATA, "--max-images", "2", "--device", "cpu", "--patch-type", "graph", "--threshold", "0.9")
    assert "mean_iou" in merged


@pytest.fixture
def toy():
    """A method that somebody registered."""
    calls = []

    def merge(step):
        calls.append(step.layer)
        n_images, n_tokens = step.x.shape[:2]
        one = torch.zeros(n_images, n_tokens, dtype=torch.long)
        return Reduction(one, torch.ones(n_images, dtype=torch.long), [1] * n_images, step.sizes)

    patch.register("toy", merge, layers=(2,))
    yield calls
    del METHODS["toy"]


def test_a_registered_method_is_offered_by_every_command(run, toy, folder_data, tmp_path):
    merging = ["--patch-type", "toy", "--device", "cpu"]
    call(test, run, *merging)
    call(miou, run, "folder", *merging, "--selected-layer", "1")
    assert "| toy |" in call(speedtest, run, "folder", "--device", "cpu", "--compare", "pure,toy", "--warmup", "1")
    assert "GFLOPs" in call(flops, run, "folder", *merging)
    assert "1.0" in call(token_stats, run, "folder", *merging, "--out", tmp_path / "stats")
    assert "merging" in call(profile_model, run, "folder", *merging, "--out", tmp_path / "trace.json")
    image = sorted((folder_data / "images/val").iterdir())[0]
    call(show_attn_map, run, image, tmp_path / "pictures", "folder", "--cls", "--enc", "--layer-id", "1", *merging)
    assert "graph, algm" in refused(tune_threshold, run, "folder", *merging)  # it has no threshold to tune
    call(inference, run, "-i", folder_data / "images/val", "-o", tmp_path / "out", "--patch-type", "toy")
    assert set(toy) == {1, 2}
    call(train, "--log-dir", tmp_path / "run", "--dataset", "folder", *TINY, "--patch-type", "toy")
    assert read_variant(tmp_path / "run")["dataset_kwargs"]["patch_type"] == "toy"


class TestRefused:
    def test_photographs_are_not_overwritten(self, run, folder_data):
        photographs = folder_data / "images/val"
        before = {file.name: file.read_bytes() for file in photographs.iterdir()}
        assert "overwrite" in refused(inference, run, "-i", photographs, "-o", photographs)
        assert {file.name: file.read_bytes() for file in photographs.iterdir()} == before

    def test_pictures_that_cannot_be_written(self, run, folder_data, tmp_path):
        (tmp_path / "0.png").mkdir()
        assert "cannot write" in refused(inference, run, "-i", folder_data / "images/val", "-o", tmp_path)

    def test_a_variant_without_data(self, run, tmp_path):
        variant = read_variant(run)
        del variant["dataset_kwargs"]
        write_variant(variant, tmp_path)
        (tmp_path / "checkpoint.pth").write_bytes((run / "checkpoint.pth").read_bytes())
        assert "dataset" in refused(test, tmp_path, "--device", "cpu")

    def test_checkpoints(self, run, tmp_path):
        assert "nowhere" in refused(test, tmp_path / "nowhere")
        (tmp_path / "variant.yml").write_text((run / "variant.yml").read_text())
        (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
        assert "damaged" in refused(test, tmp_path)
        assert "damaged" in refused(train, "--log-dir", tmp_path, "--resume")
        assert "damaged" in refused(train, "--log-dir", tmp_path / "new", "--finetune", tmp_path)
        assert (tmp_path / "checkpoint.pth").read_bytes() == b"damaged"

    def test_another_number_of_classes(self, run):
        assert "11 classes" in refused(miou, run, "shapes", "--device", "cpu")

    def test_photographs(self, run, tmp_path):
        assert "nowhere" in refused(inference, run, "-i", tmp_path / "nowhere", "-o", tmp_path / "out")
        (tmp_path / "in").mkdir()
        assert "no photograph" in refused(inference, run, "-i", tmp_path / "in", "-o", tmp_path / "out")
        (tmp_path / "in/a.png").write_bytes(b"")
        assert "a.png" in refused(inference, run, "-i", tmp_path / "in", "-o", tmp_path / "out")


@pytest.mark.parametrize("file", ["train.py", "test.py", "inference.py", "eval/miou.py"])
def test_commands_run_as_files_and_as_modules(file):
    module = "segm." + file.removesuffix(".py").replace("/", ".")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for how in ([f"segm/{file}"], ["-m", module]):
        result = subprocess.run(
            [sys.executable, *how, "--help"], cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0 and "--patch-type" in result.stdout and result.stderr == ""
