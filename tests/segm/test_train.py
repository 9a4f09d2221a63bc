"""The training command, end to end: what a tiny run leaves behind, resuming, fine-tuning, and input that is wrong."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from torch import nn

import patch
from g2tm import Grouping
from patch import Number, Option
from segm import auto_threshold, flops, test, train, trainer
from segm.checkpoint import load_checkpoint
from segm.run import Run
from segm.trainer import Trainer
from tests.forked import printed
from tests.helpers import by_speed, read_variant

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
NETWORK = ["--backbone", "vit_tiny_patch16_384", "--no-pretrained", "--num-workers", "0", "--device", "cpu"]
NETWORK += ["--patch-size", "8", "--d-model", "32", "--n-heads", "2", "--n-layers", "2", "--batch-size", "2"]
TINY = [*NETWORK, "--im-size", "32", "--crop-size", "32", "--epochs", "2", "--learning-rate", "0.01"]
CURRICULUM = ["--patch-type", "graph", "--threshold", "0.88", "--start-thresh", "0.9"]
CURRICULUM += ["--curric-warmup", "1", "--curric-period", "1"]
KEYS = ("pixel_accuracy", "mean_accuracy", "mean_iou")


@pytest.fixture(autouse=True)
def small_data(monkeypatch, folder_data):
    """The user's own data, and few shapes."""
    monkeypatch.setenv("DATASET", str(folder_data))
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 4, "val": 2})


@pytest.fixture(scope="module")
def run(folder_data, tmp_path_factory, call):
    """A finished training with graph merging on the user's own data."""
    folder = tmp_path_factory.mktemp("runs") / "graph"
    with pytest.MonkeyPatch.context() as context:
        context.setenv("DATASET", str(folder_data))
        options = ["--patch-type", "graph", "--selected-layer", "1", "--threshold", "0.5", "--prop-attn"]
        call(train, "--log-dir", folder, "--dataset", "folder", *TINY, *options)
    return folder


@pytest.fixture
def planned(call, tmp_path, monkeypatch):
    """Run the command up to the first epoch; returns the variant."""

    def plan(*options):
        found = []
        with monkeypatch.context() as context:
            context.setattr(Trainer, "fit", lambda self: found.append(self.config.to_variant()))
            call(train, "--log-dir", tmp_path / "planned", *NETWORK, "--dataset", "shapes", *options)
        return found[0]

    return plan


def entries_of(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_a_training_leaves_everything_behind(run):
    assert {"checkpoint.pth", "checkpoint_best.pth", "variant.yml", "log.txt"} <= {f.name for f in run.iterdir()}
    assert any(f.name.startswith("events.out.tfevents") for f in run.iterdir())
    entries = entries_of(run)
    assert [entry["epoch"] for entry in entries] == [0, 1]
    assert entries[-1]["num_updates"] == 4 and entries[-1]["threshold"] == 0.5
    for key in ("train_loss", "train_learning_rate", *(f"val_{key}" for key in KEYS)):
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


class Gated(Grouping):
    """Groups whose means are scaled by something learned."""

    gate = None

    def merge(self, x):
        return super().merge(x) * self.gate


@pytest.fixture
def toy():
    """A method with options of its own, and a learned part whose width is one of them."""

    def merge(step):
        size, n_tokens = step.options["group"], step.x.shape[1]
        assignment = (torch.arange(n_tokens) // size).repeat(len(step.x), 1)
        merged = Gated.of_length(assignment, -(-n_tokens // size), step.sizes)
        merged.gate = 1 + step.block.gate.weight.mean()
        return merged

    def build(encoder, blocks, width):
        for block in blocks:
            block.gate = nn.Linear(1, width, bias=False)

    options = {
        "group": Option(2, "Neighbors that merge.", type=Number(1, 16, integer=True), flag="--toy-group", key="toy"),
        "width": Option(3, "Width of the gate.", type=Number(1, integer=True)),
        "quick": Option(False, "Whether it hurries."),
    }
    yield patch.register("toy", merge, modules=build, layers=(2,), **options)
    del patch.METHODS["toy"]


def test_a_method_with_options_and_a_learned_part_is_one_entry(toy, tmp_path, call, refused):
    """Trained by the real command, its options are found again in every place where options are."""
    folder = tmp_path / "toy"
    options = ["--patch-type", "toy", "--toy-group", "4", "--width", "5", "--quick", "true"]
    call(train, "--log-dir", folder, "--dataset", "shapes", *TINY, "--epochs", "1", *options)
    variant, weights = read_variant(folder), load_checkpoint(folder)["model"]
    saved = {"patch_type": "toy", "toy": 4, "width": 5, "quick": True, "selected_layer": 2}
    assert variant["dataset_kwargs"].items() >= saved.items()
    assert variant["net_kwargs"]["reduction"] == {"name": "toy", "width": 5}
    assert weights["encoder.blocks.0.gate.weight"].shape == (5, 1)

    again = Run.load(folder, device="cpu")  # as test.py does
    assert again.options["group"] == 4 and again.options["quick"] is True and again.model.encoder.blocks[0].gate
    patches = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        again.model(patches)
    assert patch.reduction(again.model).counts.tolist() == [4]
    score = f"mean_iou: {entries_of(folder)[-1]['val_mean_iou']:.2f}"
    assert score in call(test, folder, "--device", "cpu")
    call(test, folder, "--device", "cpu", "--toy-group", "8")
    call(test, folder, "--device", "cpu", "--patch-type", "pure")  # the learned part rests
    for command in (train, test):
        assert "Neighbors that merge. [default: 2]" in " ".join(call(command, "--patch-type", "toy", "--help").split())
    assert "1 to 16" in refused(test, folder, "--toy-group", "99")

    call(train, "--log-dir", folder, "--resume", "--epochs", "2", "--device", "cpu")
    resumed = load_checkpoint(folder)["model"]
    assert not torch.equal(resumed["encoder.blocks.1.gate.weight"], weights["encoder.blocks.1.gate.weight"])
    call(train, "--log-dir", tmp_path / "tuned", "--finetune", folder, "--epochs", "1", "--device", "cpu")
    assert read_variant(tmp_path / "tuned")["net_kwargs"] == variant["net_kwargs"]
    assert "--finetune" in refused(test, folder, "--patch-type", "dtem")  # it has learned parts of another method
    wider = ["--log-dir", tmp_path / "no", "--finetune", folder, "--epochs", "1", "--width", "6"]
    assert "learned with 5" in refused(train, *wider) and "learned with 5" in refused(test, folder, "--width", "6")


def test_fine_tuning_adds_the_learned_part_to_weights_that_lack_it(toy, run, tmp_path, monkeypatch, call):
    models = []
    monkeypatch.setattr(Trainer, "fit", lambda self: models.append(self.model))
    for method in ("toy", "dtem"):
        options = ["--finetune", run, "--patch-type", method, "--device", "cpu"]
        call(train, "--log-dir", tmp_path / method, *options)
        weights, own = load_checkpoint(run)["model"], models[-1].state_dict()
        new = {key for key in own if ".gate." in key or "metric_layer" in key}
        assert new and len(own) == len(weights) + len(new)
        shared = weights.keys() & own.keys()
        assert "encoder.blocks.1.mlp.fc1.weight" in shared
        assert all(torch.equal(own[key], weights[key]) for key in shared)


LEARNING = {"ltmp": "masker", "diffrate": "_ddp", "dtem": "metric_layer", "fpet": "metric_adapter"}


@pytest.mark.parametrize("method", LEARNING)
def test_learned_parts_train_alone(method, run, tmp_path, call, refused):
    """From a trained pure run; all other weights stay, and every command goes by what was learned."""
    folder, rates = tmp_path / method, ["--optimizer", "adamw", "--learning-rate", "0.1", "--num-workers", "0"]
    options = ["--finetune", run, "--patch-type", method, "--train-only", "method", "--epochs", "3", *rates]
    interrupt_after(2, lambda: call(train, "--log-dir", folder, *options, "--device", "cpu"))
    call(train, "--log-dir", folder, "--resume", "--device", "cpu")
    before, after = load_checkpoint(run)["model"], load_checkpoint(folder)["model"]
    learned = {name for name in after if LEARNING[method] in name}
    old = {name: after[name.replace(".qkv.", ".qkv.qkv_layer.") if name not in after else name] for name in before}
    assert all(torch.equal(value, before[name]) for name, value in old.items())
    first = [p for name, p in Run.load(run, device="cpu").model.named_parameters() if LEARNING[method] in name]
    assert learned and not first and len(entries_of(folder)) == 3
    if method == "ltmp":
        assert any(after[name] != 0.9 for name in learned if "merge" in name)
        assert all(0 <= after[name] <= 1 for name in learned)
        assert "--not-learned" in refused(test, folder, "--merge-threshold", "0.5")
        call(test, folder, "--not-learned", "--merge-threshold", "0.5", "--device", "cpu")
    data = read_variant(folder)["dataset_kwargs"]
    assert method == "dtem" or data["adapter" if method == "fpet" else "learned"] is True
    score = f"mean_iou: {entries_of(folder)[-1]['val_mean_iou']:.2f}"
    assert score in call(test, folder, "--device", "cpu")
    assert "GFLOPs" in call(flops, folder, "folder", "--device", "cpu")


def test_clusters_learn_from_labels(folder_data, tmp_path, call, refused):
    folder, merging = tmp_path / "clusters", ["--patch-type", "clustvit", "--clusters", 2, "--injection-point", 1]
    printed = call(train, "--log-dir", folder, "--dataset", "folder", *TINY, *merging, "--cluster-width", 24)
    assert "loss of the method" in printed
    assert all(0 < entry["train_method_loss"] < entry["train_loss"] for entry in entries_of(folder))
    variant = read_variant(folder)
    assert variant["net_kwargs"]["reduction"] == {"name": "clustvit", "clusters": 2, "cluster_width": 24}
    assert variant["dataset_kwargs"]["selected_layer"] == 1
    assert load_checkpoint(folder)["model"]["encoder.clusterer.net.0.weight"].shape == (24, 32)
    call(train, "--log-dir", folder, "--resume", "--epochs", 3, "--device", "cpu")
    for options in ((), ("--patch-type", "pure"), ("--patch-type", "graph", "--selected-layer", 1)):
        assert "mean_iou" in call(test, folder, "--device", "cpu", *options)
    last = ("--patch-type", "clustvit", "--injection-point", 2)
    assert "one injection point, from 0 to 1" in refused(
        train, "--log-dir", tmp_path / "b", "--dataset", "folder", *TINY, *last
    )


def test_a_frozen_encoder_stays_as_it_is(run, tmp_path, call):
    call(
        train, "--log-dir", tmp_path / "new", "--finetune", run, "--freeze-encoder", "--epochs", "2", "--device", "cpu"
    )
    before, after = load_checkpoint(run)["model"], load_checkpoint(tmp_path / "new")["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("decoder.") for name in changed)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, call):
    common = ["--dataset", "folder", *TINY, "--dropout", "0.1", "--epochs", "3"]
    call(train, "--log-dir", tmp_path / "whole", *common)
    call(train, "--log-dir", tmp_path / "parts", *common, "--eval-freq", "2")
    whole = load_checkpoint(tmp_path / "whole")["model"]
    interrupt_after(2, lambda: call(train, "--log-dir", tmp_path / "cut", *common))
    call(train, "--log-dir", tmp_path / "cut", "--resume", "--device", "cpu")
    for folder in ("parts", "cut"):
        weights = load_checkpoint(tmp_path / folder)["model"]
        assert all(torch.equal(weights[key], value) for key, value in whole.items())
    assert len(entries_of(tmp_path / "cut")) == 3


def interrupt_after(epochs, training):
    """A training that is killed after some epochs."""
    real = Trainer.start_epoch

    def start_epoch(self):
        if self.epoch == epochs:
            raise KeyboardInterrupt
        real(self)

    with pytest.MonkeyPatch.context() as context:
        context.setattr(Trainer, "start_epoch", start_epoch)
        with pytest.raises(AssertionError, match="Aborted"):
            training()


def test_annealing_ends_with_the_training(tmp_path, call):
    """Also that of one epoch; what is fine-tuned from it goes on unmasked."""
    pytest.importorskip("transformers")
    options = ["--decoder", "eomt", "--decoder-blocks", "1", "--epochs", "1"]
    call(train, "--log-dir", tmp_path / "eomt", "--dataset", "shapes", *TINY, *options)
    call(train, "--log-dir", tmp_path / "on", "--finetune", tmp_path / "eomt", "--epochs", "2", "--device", "cpu")
    for folder in ("eomt", "on"):
        assert load_checkpoint(tmp_path / folder)["model"]["decoder.mask_probs"].tolist() == [0.0]


def test_fine_tuning_starts_from_the_weights_and_settings(run, tmp_path, call):
    common = ["--finetune", run, "--epochs", "1", "--device", "cpu"]
    call(train, "--log-dir", tmp_path / "tuned", *common, "--threshold", "0.7")
    variant = read_variant(tmp_path / "tuned")
    assert variant["net_kwargs"] == read_variant(run)["net_kwargs"]
    assert variant["dataset_kwargs"]["threshold"] == 0.7 and variant["dataset_kwargs"]["patch_type"] == "graph"
    call(train, "--log-dir", tmp_path / "plain", *common, "--patch-type", "pure")
    assert read_variant(tmp_path / "plain")["dataset_kwargs"]["patch_type"] == "pure"


def test_a_recipe_gives_defaults_and_options_override_it(tmp_path, planned):
    recipe = {"patch_type": "graph", "selected_layer": 2, "threshold": 0.89, "epochs": 4}
    recipe |= {"start_thresh": 0.91, "curric_warmup": 1, "curric_period": 1, "learning_rate": 0.25}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    common = ["--config", tmp_path / "recipe.yml"]
    for options, expected in (
        ([], {"patch_type": "graph", "threshold": 0.89, "start_threshold": 0.91, "selected_layer": 2}),
        (["--threshold", "0.9", "--selected-layers", "1"], {"threshold": 0.9, "selected_layer": 1}),
        (["--patch-type", "pure"], {"patch_type": "pure", "threshold": None, "start_threshold": None}),
        (["--patch-type", "tome", "--r", "2"], {"r": 2, "threshold": None, "curriculum_start": None}),
    ):
        variant = planned(*common, *options)
        assert {key: variant["dataset_kwargs"].get(key) for key in expected} == expected
        assert variant["optimizer_kwargs"]["lr"] == 0.25 and variant["algorithm_kwargs"]["num_epochs"] == 4
    assert planned(*common, "--learning-rate", "0.5")["optimizer_kwargs"]["lr"] == 0.5


def test_a_curriculum_lowers_the_threshold(tmp_path, call, monkeypatch):
    """And scores from before its end do not count: the best checkpoint merges as the final one."""
    scores = iter([90.0, 80.0, 30.0, 20.0])
    monkeypatch.setattr(trainer, "segmentation_scores", lambda confusion: dict.fromkeys(KEYS, next(scores)))
    options = [*CURRICULUM, "--epochs", "4", "--eval-freq", "1"]
    call(train, "--log-dir", tmp_path / "run", "--dataset", "folder", *TINY, *options)
    assert [entry["threshold"] for entry in entries_of(tmp_path / "run")] == [0.9, 0.89, 0.88, 0.88]
    data = read_variant(tmp_path / "run")["dataset_kwargs"]
    assert (data["threshold"], data["start_threshold"]) == (0.88, 0.9)
    assert (data["curriculum_start"], data["curriculum_period"]) == (1, 1)
    assert load_checkpoint(tmp_path / "run/checkpoint_best.pth")["epoch"] == 2
    assert load_checkpoint(tmp_path / "run")["best_mean_iou"] == 30.0


def test_the_automatic_threshold(shapes_run, tmp_path, monkeypatch, call, refused):
    asked = []

    def thresholds(checkpoint, name, layers, device, size):
        asked.append((checkpoint, name, layers, size))
        return {layers[0]: auto_threshold.Similarity(found["mean"], 0.25)}

    found = {"mean": 0.5}
    monkeypatch.setattr(auto_threshold, "automatic_thresholds", thresholds)
    monkeypatch.setattr(Trainer, "fit", lambda self: asked.append(patch.options(self.model)))
    options = ["--log-dir", tmp_path / "new", "--finetune", shapes_run, "--patch-type", "algm"]
    options += ["--selected-layers", 1, 3, "--threshold", "auto", "--device", "cpu"]
    assert "--from" in refused(train, *options)
    others = (["--patch-type", "tome"], ["--metric", "keys"], ["--merge-after", "mlp"])
    for wrong in (["--selected-layers", 1, 99], ["--merging-window-size", 9, 9], *others):
        refused(train, *options, "--from", shapes_run, *wrong)
        assert asked == []  # before any image is read
    call(train, *options, "--from", shapes_run)
    assert asked[0] == (shapes_run, "shapes", [1], 32) and asked[1]["threshold"] == 0.75
    for found["mean"], suspicious in ((-1.25, True), (1, False)):  # everything merges, and nothing
        assert ("g2tm tune" in call(train, *options, "--from", shapes_run)) == suspicious


def test_a_run_is_never_overwritten(run, refused, call):
    before = (run / "checkpoint.pth").read_bytes()
    assert "--resume" in refused(train, "--log-dir", run, "--dataset", "folder", *TINY)
    assert "finished" in call(train, "--log-dir", run, "--resume", "--device", "cpu")  # a loop that restarts it ends
    message = refused(train, "--log-dir", run, "--resume", "--epochs", "9", "--optimizer", "adamw")
    assert "--optimizer" in message and "--finetune" in message
    assert (run / "checkpoint.pth").read_bytes() == before


def test_wrong_options_are_refused_in_one_line(tmp_path, refused):
    (tmp_path / "bad.yml").write_text("learningrate: 1")
    graph = ["--patch-type", "graph"]
    for options, hint in (
        ([*graph, "--threshold", "2"], "-1 to 1"),
        ([*graph, "--selected-layer", "9"], "1 to 2"),
        ([*graph, "--selected-layers", "1", "2"], "one layer"),
        ([*graph, "--selected-layer", "1", "--selected-layers", "2"], "--selected-layers"),
        ([*graph, "--prop-attn", "--iprop-attn"], "choose one"),
        (["--threshold", "0.9"], "--patch-type"),
        (["--patch-type", "nosuch"], "graph"),
        ([*graph, "--start-thresh", "0.9"], "--curric-warmup"),
        (["--start-thresh", "0.9", "--curric-warmup", "1", "--curric-period", "1"], "--threshold"),
        (["--backbone", "vit_nosuch"], "vit_tiny_patch16_384"),
        (["--device", "cuda:99"], "not available"),
        (["--pretrained", "nowhere.pth"], "nowhere.pth"),
        (["--pretrained", str(DATA / "checkpoint.pth")], "--no-pretrained"),
        (["--finetune", "nowhere"], "nowhere"),
        (["--config", "nowhere.yml"], "ade20k_512_tiny_graph"),
        (["--config", tmp_path / "bad.yml"], "learningrate"),
        (["--window-size", "16", "--window-stride", "32"], "stride"),
        (["--warmup-epochs", "2"], "warm-up"),
        ([*CURRICULUM, "--threshold", "0.8"], "more --epochs"),
    ):
        assert hint in refused(train, "--log-dir", tmp_path / "run", "--dataset", "folder", *TINY, *options), options
        assert not (tmp_path / "run/checkpoint.pth").exists()


def test_damaged_data_is_named(folder_data, tmp_path, monkeypatch, refused):
    def message(*options):
        return refused(train, "--log-dir", tmp_path / "run", "--dataset", "folder", *TINY, *options)

    for name, damage, hint in (
        ("labels", lambda root: cv2.imwrite(str(root / "annotations/train/1.png"), np.full((40, 48), 7, np.uint8)),
         "annotations/train/1.png: label 7"),
        ("image", lambda root: (root / "images/train/2.jpg").write_bytes(b"no image"), "images/train/2.jpg"),
    ):  # fmt: skip
        root = Path(shutil.copytree(folder_data, tmp_path / name))
        damage(root)
        monkeypatch.setenv("DATASET", str(root))
        for workers in ("0", "1"):
            found = message("--num-workers", workers)
            assert hint in found and len(found) < 300
    monkeypatch.setenv("DATASET", str(tmp_path / "nowhere"))
    assert "nowhere" in message()
    monkeypatch.delenv("DATASET")
    assert "DATASET" in message()


@pytest.mark.parametrize(
    ("n_processes", "words"),
    by_speed(
        [
            (4, "graph --selected-layer 1 --threshold 0.5"),  # two images to score: two processes have none
            (2, "algm --selected-layers 1 2 --threshold 0.5"),
            (2, "tome --r 2"),
            (2, "dtem --r 2 --selected-layers 2"),  # the learned part of the first layer gets no gradient
            (2, "ltmp --learned"),
        ],
        slow=[(4, "graph --selected-layer 1 --threshold 0.5")],
    ),
)
def test_several_processes_train_and_score_like_one(forked, n_processes, words, tmp_path, call):
    """The same losses and scores as one process, one run directory, every image counted once."""
    still = ["--drop-path", "0", "--decoder-dropout", "0", "--batch-size", "4"]
    options = ["--dataset", "folder", *TINY, *still, "--patch-type", *words.split()]
    call(train, "--log-dir", tmp_path / "alone", *options)
    together(forked, n_processes, "segm.train", "--log-dir", tmp_path / "run", *options, output=tmp_path / "training")
    alone, entries = entries_of(tmp_path / "alone"), entries_of(tmp_path / "run")
    assert [entry["num_updates"] for entry in entries] == [1, 2]
    for one, several in zip(alone, entries, strict=True):
        # ALGM merges as many tokens of every image of a process, DTEM draws its halves in each process, LTMP
        # compares the operations of each process with its target, and after an update rounding may turn a merge.
        loss, score = (0.01, 10) if words.startswith(("algm", "dtem", "ltmp")) or one["epoch"] else (1e-5, 0.5)
        assert several["train_loss"] == pytest.approx(one["train_loss"], rel=loss)
        assert several["val_mean_iou"] == pytest.approx(one["val_mean_iou"], abs=score)
    scored = call(test, tmp_path / "run", "--device", "cpu")
    assert f"mean_iou: {entries[-1]['val_mean_iou']:.2f}" in scored
    found = together(forked, n_processes, "segm.test", tmp_path / "run", "--device", "cpu", output=tmp_path / "test")
    assert found == scored


def together(forked, n_processes, command, *arguments, output):
    """Run a command in several processes, with gloo; returns what they print."""
    data = {"DATASET": os.environ["DATASET"]}
    for process in forked.together(n_processes, command, *arguments, output=output, **data):
        process.join(300)
        assert process.exitcode == 0, printed(output)
    out, err = printed(output)
    assert "arning" not in err
    return out


@pytest.mark.nightly
@pytest.mark.parametrize("everywhere", by_speed([True, False], slow=[False]))
def test_a_process_that_fails_ends_the_others_with_one_message(folder_data, tmp_path, everywhere):
    """A cut image is met by one process, a missing one by all: the message stands at the end of torchrun's, once."""
    root = Path(shutil.copytree(folder_data, tmp_path / "data"))
    photo = root / "images/train/2.jpg"
    photo.write_bytes(photo.read_bytes()[:-200])
    if everywhere:
        (root / "annotations/train/1.png").unlink()
    begin = time.monotonic()
    options = ["--log-dir", tmp_path / "run", "--dataset", "folder", *TINY, "--batch-size", "2"]
    # Without the "--", torchrun takes --r for an option of its own.
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    command = [*torchrun, "segm/train.py", *map(str, options)]
    environment = os.environ | {"DATASET": str(root)}
    ended = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode != 0 and time.monotonic() - begin < 120
    name = "annotations/train/1.png" if everywhere else "images/train/2.jpg"
    assert ended.stderr.count("Error: ") - ended.stderr.count("FailedError: ") == 1, ended.stderr
    assert name in ended.stderr and name in " ".join(ended.stderr.splitlines()[-3:])


@pytest.mark.parametrize("method", by_speed(["pure", *patch.METHODS], slow=["graph"]))
def test_training_with_every_method_converges(method, tmp_path, call, monkeypatch):
    """A few hundred steps from one plain start: the loss falls to where the plain model's falls."""
    monkeypatch.undo()
    network = ["--backbone", "vit_tiny_patch16_384", "--no-pretrained", "--patch-size", "4", "--d-model", "32"]
    network += ["--n-heads", "2", "--n-layers", "3", "--drop-path", "0", "--decoder-dropout", "0"]
    options = ["--dataset", "shapes", "--im-size", "32", "--crop-size", "32", "--batch-size", "10", "--epochs", "1"]
    options += ["--optimizer", "adamw", "--learning-rate", "2e-3", "--num-workers", "0", "--device", "cpu"]
    own = {
        "graph": ["--threshold", "0.95"],
        "algm": ["--selected-layers", "1", "2", "--threshold", "0.95"],
        "mpm": ["--selected-layers", "2"],
        "clustvit": ["--injection-point", "1"],
    }
    entry = patch.METHODS.get(method)
    merging = own.get(method, ["--r", "6"] if entry is not None and entry.takes("r") else [])
    call(train, "--log-dir", tmp_path, *network, *options, "--patch-type", method, *merging)
    (last,) = entries_of(tmp_path)
    assert last["num_updates"] == 200
    assert last["train_loss"] < 2.1 and last["val_mean_iou"] > 8, method  # at random: 2.4 and 3
    assert read_variant(tmp_path)["dataset_kwargs"]["patch_type"] == method
