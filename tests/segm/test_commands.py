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
from patch.registry import METHODS

import patch
from g2tm import Reduction
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
from segm.checkpoint import load_checkpoint, read_variant, write_variant
from segm.eval import miou
from segm.options import repeat_option
from segm.settings import PLACES, read_settings

CURRICULUM = ["--patch-type", "graph", "--threshold", "0.8", "--start-thresh", "0.9"]
CURRICULUM += ["--curric-warmup", "1", "--curric-period", "1"]
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


def test_a_training_leaves_everything_behind(run):
    assert {"checkpoint.pth", "checkpoint_best.pth", "variant.yml", "log.txt"} <= {f.name for f in run.iterdir()}
    assert any(f.name.startswith("events.out.tfevents") for f in run.iterdir())
    entries = [json.loads(line) for line in (run / "log.txt").read_text().splitlines()]
    assert [entry["epoch"] for entry in entries] == [0, 1]
    assert entries[-1]["num_updates"] == 4 and entries[-1]["threshold"] == 0.5
    for key in ("train_loss", "train_learning_rate", "val_pixel_accuracy", "val_mean_accuracy", "val_mean_iou"):
        assert isinstance(entries[-1][key], float)
    checkpoint = load_checkpoint(run)
    assert checkpoint["epoch"] == 1 and checkpoint["n_cls"] == 3
    assert {"model", "optimizer", "lr_scheduler"} <= set(checkpoint)


def test_variant_holds_the_published_sections(run):
    variant = read_variant(run)
    data = variant["dataset_kwargs"]
    assert (data["patch_type"], data["selected_layer"], data["threshold"]) == ("graph", 1, 0.5)
    assert (data["attention"], data["batch_mode"]) == ("proportional", "ragged")
    assert (data["image_size"], data["crop_size"], data["normalization"]) == (32, 32, "vit")
    assert variant["net_kwargs"]["decoder"]["n_cls"] == variant["net_kwargs"]["n_cls"] == 3
    assert variant["inference_kwargs"]["window_size"] == 32
    assert variant["optimizer_kwargs"]["opt"] == "sgd" and variant["world_batch_size"] == 2
    assert [c["name"] for c in data["classes"]] == ["floor", "wall", "door"]


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


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    common = ["--dataset", "folder", *TINY, "--dropout", "0.1"]
    call(train, "--log-dir", tmp_path / "whole", *common, "--epochs", "3")
    call(train, "--log-dir", tmp_path / "parts", *common, "--epochs", "3", "--eval-freq", "2")
    whole = load_checkpoint(tmp_path / "whole")["model"]
    interrupt_after(tmp_path / "cut", 2, common)
    call(train, "--log-dir", tmp_path / "cut", "--resume", "--device", "cpu")
    for folder in ("parts", "cut"):
        weights = load_checkpoint(tmp_path / folder)["model"]
        assert all(torch.equal(weights[key], value) for key, value in whole.items())
    assert len((tmp_path / "cut/log.txt").read_text().splitlines()) == 3


def interrupt_after(folder, epochs, common):
    """A training of three epochs that is killed after some."""
    real, calls = train.train_one_epoch, []

    def one_epoch(*args, **kwargs):
        if len(calls) == epochs:
            raise KeyboardInterrupt
        calls.append(None)
        return real(*args, **kwargs)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(train, "train_one_epoch", one_epoch)
        assert invoke(train, ["--log-dir", folder, *common, "--epochs", "3"]).exit_code != 0


def test_fine_tuning_starts_from_the_weights_and_settings(run, tmp_path):
    call(
        train,
        "--log-dir",
        tmp_path / "tuned",
        "--finetune",
        run,
        "--epochs",
        "1",
        "--device",
        "cpu",
        "--threshold",
        "0.7",
    )
    variant = read_variant(tmp_path / "tuned")
    assert variant["net_kwargs"] == read_variant(run)["net_kwargs"]
    assert variant["dataset_kwargs"]["threshold"] == 0.7 and variant["dataset_kwargs"]["patch_type"] == "graph"
    call(train, "--log-dir", tmp_path / "plain", "--finetune", run, "--epochs", "1", "--patch-type", "pure")
    assert read_variant(tmp_path / "plain")["dataset_kwargs"]["patch_type"] == "pure"


def test_a_recipe_gives_defaults_and_options_override_it(tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(yaml.safe_dump({"dataset": "folder", "patch_type": "graph", "threshold": 0.9, "epochs": 1}))
    call(train, "--config", recipe, "--log-dir", tmp_path / "a", *TINY[:-4], "--learning-rate", "0.01")
    assert read_variant(tmp_path / "a")["dataset_kwargs"]["threshold"] == 0.9
    assert len((tmp_path / "a/log.txt").read_text().splitlines()) == 1
    options = ["--threshold", "0.8", "--epochs", "2", "--learning-rate", "0.01"]
    call(train, "--config", recipe, "--log-dir", tmp_path / "b", *TINY[:-4], *options)
    assert read_variant(tmp_path / "b")["dataset_kwargs"]["threshold"] == 0.8


def test_another_method_than_the_recipe_s_drops_what_it_says_about_merging(tmp_path):
    recipe = {"dataset": "folder", "patch_type": "graph", "selected_layer": 2, "threshold": 0.9, "epochs": 2}
    recipe |= {"start_thresh": 0.91, "curric_warmup": 1, "curric_period": 1}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    common = ["--config", tmp_path / "recipe.yml", *TINY[:-4], "--learning-rate", "0.01"]
    call(train, *common, "--log-dir", tmp_path / "pure", "--patch-type", "pure")
    assert read_variant(tmp_path / "pure")["dataset_kwargs"]["patch_type"] == "pure"
    call(train, *common, "--log-dir", tmp_path / "tome", "--patch-type", "tome", "--r", "2")
    data = read_variant(tmp_path / "tome")["dataset_kwargs"]
    assert data["r"] == 2 and data["threshold"] is None and "start_threshold" not in data


def test_every_setting_reaches_the_variant_file(tmp_path):
    given = {
        "dropout": 0.25, "decoder_dropout": 0.35, "drop_path": 0.15, "optimizer": "adamw", "scheduler": "cosine",
        "learning_rate": 0.002, "minlearning_rate": 0.0001, "weight_decay": 0.03, "warmup_epochs": 1,
        "start_factor": 0.5, "batch_size": 4, "epochs": 2, "eval_freq": 2, "num_workers": 0, "seed": 3,
        "im_size": 40, "crop_size": 32, "window_size": 32, "window_stride": 16, "normalization": "deit",
        "patch_size": 8, "d_model": 64, "n_heads": 4, "n_layers": 1, "decoder": "mask_transformer",
        "dataset": "folder", "backbone": "vit_tiny_patch16_384",
    }  # fmt: skip
    options = [text for name, value in given.items() for text in ("--" + name.replace("_", "-"), value)]
    call(train, "--log-dir", tmp_path / "run", "--no-pretrained", "--amp", "--device", "cpu", *options)
    assert read_settings(read_variant(tmp_path / "run")) == given | {"amp": True}
    assert set(given) | {"amp"} == set(PLACES)


def test_the_best_checkpoint_merges_as_the_final_one(tmp_path, monkeypatch):
    """Scores from before the curriculum's end do not count."""
    scores = iter([90.0, 80.0, 30.0, 20.0])
    monkeypatch.setattr(train, "segmentation_scores", lambda confusion: dict.fromkeys(KEYS, next(scores)))
    options = [*CURRICULUM, "--threshold", "0.89", "--epochs", "4", "--eval-freq", "1"]
    call(train, "--log-dir", tmp_path / "run", "--dataset", "folder", *TINY, *options)
    assert load_checkpoint(tmp_path / "run/checkpoint_best.pth")["epoch"] == 1
    assert load_checkpoint(tmp_path / "run")["best_mean_iou"] == 80.0


KEYS = ("pixel_accuracy", "mean_accuracy", "mean_iou")


def test_a_curriculum_lowers_the_threshold(tmp_path):
    options = ["--patch-type", "graph", "--threshold", "0.88", "--start-thresh", "0.9"]
    options += ["--curric-warmup", "1", "--curric-period", "1", "--epochs", "4"]
    call(train, "--log-dir", tmp_path / "run", "--dataset", "folder", *TINY, *options)
    entries = [json.loads(line) for line in (tmp_path / "run/log.txt").read_text().splitlines()]
    assert [entry["threshold"] for entry in entries] == [0.9, 0.89, 0.88, 0.88]
    data = read_variant(tmp_path / "run")["dataset_kwargs"]
    assert (data["threshold"], data["start_threshold"]) == (0.88, 0.9)
    assert (data["curriculum_start"], data["curriculum_period"]) == (1, 1)


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
    def train(self, folder, *options):
        return refused(train, "--log-dir", folder, "--dataset", "folder", *TINY, *options)

    def test_a_run_is_never_overwritten(self, run):
        before = (run / "checkpoint.pth").read_bytes()
        assert "--resume" in self.train(run)
        assert "finished" in refused(train, "--log-dir", run, "--resume")
        assert (run / "checkpoint.pth").read_bytes() == before

    @pytest.mark.parametrize(
        ("options", "hint"),
        [
            (["--patch-type", "graph", "--threshold", "2"], "-1 to 1"),
            (["--patch-type", "graph", "--selected-layer", "9"], "1 to 2"),
            (["--patch-type", "graph", "--selected-layers", "1", "2"], "one layer"),
            (["--patch-type", "graph", "--selected-layer", "1", "--selected-layers", "2"], "--selected-layers"),
            (["--patch-type", "graph", "--prop-attn", "--iprop-attn"], "choose one"),
            (["--threshold", "0.9"], "--patch-type"),
            (["--patch-type", "nosuch"], "graph"),
            (["--patch-type", "graph", "--start-thresh", "0.9"], "--curric-warmup"),
            (["--start-thresh", "0.9", "--curric-warmup", "1", "--curric-period", "1"], "--threshold"),
            (["--backbone", "vit_nosuch"], "vit_tiny_patch16_384"),
            (["--device", "cuda:99"], "not available"),
            (["--pretrained", "nowhere.pth"], "nowhere.pth"),
            (["--finetune", "nowhere"], "nowhere"),
            (["--config", "nowhere.yml"], "ade20k_512_tiny_graph"),
            (["--window-size", "16", "--window-stride", "32"], "stride"),
            (["--warmup-epochs", "2"], "warm-up"),
            (["--resume"], "checkpoint.pth"),
            (["--pretrained", str(DATA / "checkpoint.pth")], "--no-pretrained"),
            (CURRICULUM, "more --epochs"),
        ],
    )
    def test_options(self, tmp_path, options, hint):
        assert hint in self.train(tmp_path / "run", *options)
        assert not (tmp_path / "run/checkpoint.pth").exists()

    def test_unknown_keys_of_a_recipe(self, tmp_path):
        (tmp_path / "bad.yml").write_text("learningrate: 1")
        assert "learningrate" in self.train(tmp_path / "run", "--config", tmp_path / "bad.yml")

    def test_what_a_resumed_run_cannot_change(self, run):
        message = refused(train, "--log-dir", run, "--resume", "--epochs", "9", "--optimizer", "adamw")
        assert "--optimizer" in message and "--finetune" in message

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

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_labels_out_of_range(self, folder_data, tmp_path, monkeypatch, workers):
        root = copy_tree(folder_data, tmp_path / "data")
        cv2.imwrite(str(root / "annotations/train/1.png"), np.full((40, 48), 7, np.uint8))
        monkeypatch.setenv("DATASET", str(root))
        message = self.train(tmp_path / "run", "--num-workers", workers)
        assert "annotations/train/1.png: label 7" in message and len(message) < 300

    @pytest.mark.parametrize("workers", ["0", "1"])
    def test_a_damaged_image(self, folder_data, tmp_path, monkeypatch, workers):
        root = copy_tree(folder_data, tmp_path / "data")
        (root / "images/train/2.jpg").write_bytes(b"no image")
        monkeypatch.setenv("DATASET", str(root))
        message = self.train(tmp_path / "run", "--num-workers", workers)
        assert "images/train/2.jpg" in message and len(message) < 300

    def test_a_missing_data_set(self, tmp_path, monkeypatch):
        monkeypatch.setenv("DATASET", str(tmp_path / "nowhere"))
        assert "nowhere" in self.train(tmp_path / "run")
        monkeypatch.delenv("DATASET")
        assert "DATASET" in self.train(tmp_path / "run")

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


def copy_tree(source, target):
    import shutil

    return Path(shutil.copytree(source, target))


def test_open_ended_numbers():
    names = {"--layers"}
    assert repeat_option(["--layers", "1", "5", "x"], names) == ["--layers", "1", "--layers", "5", "x"]
    assert repeat_option(["a", "--layers", "-1", "--b", "2"], names) == ["a", "--layers", "-1", "--b", "2"]
    assert repeat_option(["--layers"], names) == ["--layers"]
    assert repeat_option(["--layers=3", "4"], names) == ["--layers", "3", "--layers", "4"]


@pytest.mark.parametrize("file", ["train.py", "test.py", "inference.py", "eval/miou.py"])
def test_commands_run_as_files_and_as_modules(file):
    module = "segm." + file.removesuffix(".py").replace("/", ".")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for how in ([f"segm/{file}"], ["-m", module]):
        result = subprocess.run(
            [sys.executable, *how, "--help"], cwd=ROOT, capture_output=True, text=True, env=environment
        )
        assert result.returncode == 0 and "--patch-type" in result.stdout and result.stderr == ""


@pytest.mark.slow
def test_two_processes_train_and_score_like_one(run, folder_data, tmp_path):
    """gloo, under torchrun: the same mIoU as one process, one run directory, every image counted once."""
    # Without the "--", torchrun takes --r for an option of its own.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    environment = os.environ | {"DATASET": str(folder_data), "OMP_NUM_THREADS": "1"}

    def launch(*arguments):
        command = [*torchrun, *map(str, arguments)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
        assert result.returncode == 0, result.stderr
        return result.stdout

    printed = launch("segm/test.py", run, "--device", "cpu")
    assert printed == call(test, run, "--device", "cpu")
    methods = {
        "graph": ["--selected-layer", "1", "--threshold", "0.5"],
        "algm": ["--selected-layers", "1", "2", "--threshold", "0.5"],
        "tome": ["--r", "2"],
    }
    for method, options in methods.items():
        folder = tmp_path / method
        launch("segm/train.py", "--log-dir", folder, "--dataset", "folder", *TINY, "--patch-type", method, *options)
        entries = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
        assert [entry["num_updates"] for entry in entries] == [2, 4]
        score = entries[-1]["val_mean_iou"]
        assert f"mean_iou: {score:.2f}" in call(test, folder, "--device", "cpu")
