"""The commands on a trained run, end to end, and input that is wrong. Training itself: test_train.py."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
import torch
import yaml

import patch
from g2tm import Grouping
from segm import (
    flops,
    inference,
    profile_model,
    report,
    show_attn_map,
    speedtest,
    test,
    token_stats,
    train,
    tune,
)
from segm.eval import miou
from segm.run import Run
from tests.forked import printed
from tests.helpers import by_speed, read_variant, write_variant

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"
TINY = [
    *["--backbone", "vit_tiny_patch16_384", "--no-pretrained", "--num-workers", "0", "--device", "cpu"],
    *["--patch-size", "8", "--d-model", "32", "--n-heads", "2", "--n-layers", "2", "--batch-size", "2"],
    *["--im-size", "32", "--crop-size", "32", "--epochs", "1", "--learning-rate", "0.01"],
]
CPU = ["--device", "cpu"]


@pytest.fixture(scope="module")
def runs(folder_data, tmp_path_factory, call):
    """Trainings with graph merging on the user's own data: in float32, and in mixed precision."""
    root = tmp_path_factory.mktemp("runs")
    options = ["--patch-type", "graph", "--selected-layer", "1", "--threshold", "0.5", "--prop-attn"]
    with pytest.MonkeyPatch.context() as context:
        context.setenv("DATASET", str(folder_data))
        for name in ("--no-amp", "--amp"):
            call(train, "--log-dir", root / name, "--dataset", "folder", *TINY, *options, name)
    return {"float32": root / "--no-amp", "amp": root / "--amp"}


@pytest.fixture(scope="module")
def run(runs):
    return runs["float32"]


@pytest.fixture(autouse=True)
def dataset_variable(monkeypatch, folder_data):
    monkeypatch.setenv("DATASET", str(folder_data))


@pytest.mark.slow
def test_every_command_takes_a_run_whose_crops_are_no_squares(folder_data, tmp_path, call):
    folder, place = tmp_path / "wide", TINY.index("--crop-size")
    sides = [*TINY[:place], *TINY[place + 2 :], "--crop-size", 24, 40, "--window-stride", 24, 16]
    merging = ["--patch-type", "graph", "--selected-layer", 1, "--threshold", 0.5]
    call(train, "--log-dir", folder, "--dataset", "folder", *sides, *merging)
    variant = read_variant(folder)
    assert variant["inference_kwargs"]["window_size"] == [24, 40] == variant["net_kwargs"]["image_size"]
    assert variant["inference_kwargs"]["window_stride"] == [24, 16]
    call(train, "--log-dir", folder, "--resume", "--epochs", 2, *CPU)
    assert Run.load(folder, device="cpu").views("folder")[0].shape == (1, 3, 24, 40)
    assert "mean_iou" in call(miou, folder, "folder", "--window-size", 24, 32, *CPU)
    assert "of 24 x 40 pixels" in call(flops, folder, "folder", *CPU)
    call(speedtest, folder, "folder", "--repeats", 1, "--warmup", 1, *CPU)
    assert "15" in call(token_stats, folder, "folder", *CPU)
    photo = folder_data / "images/val/0.jpg"
    call(show_attn_map, folder, photo, tmp_path / "pictures", "--dec", *CPU)
    labels = cv2.imread(str(next((tmp_path / "pictures/0").glob("0_*tokens.png"))))
    assert labels.shape[1] * 24 == labels.shape[0] * 40
    call(report, folder, "--out", tmp_path / "page.html", "--cost-images", 1, "--pictures", 1, "--explore", 1, *CPU)
    call(inference, folder, "-i", folder_data / "images/val", "-o", tmp_path / "labels", *CPU)
    assert cv2.imread(str(tmp_path / "labels/0.png")).shape == cv2.imread(str(photo)).shape


def test_scores_agree_between_training_test_and_miou(runs, call):
    """Also after training in mixed precision, in which the run is then scored."""
    for name, folder in runs.items():
        last = json.loads((folder / "log.txt").read_text().splitlines()[-1])
        printed = call(test, folder, *CPU)
        for key in ("pixel_accuracy", "mean_accuracy", "mean_iou"):
            assert f"{key}: {last[f'val_{key}']:.2f}" in printed, name
        call(miou, folder, "folder", *CPU, "--save-images")
        (scores,) = yaml.safe_load((folder / "scores_ss.yml").read_text())
        assert scores["mean_iou"] == last["val_mean_iou"] and scores["conditions"]["threshold"] == 0.5
        assert list(scores["per_class_iou"]) == ["floor", "wall", "door"]
        labels = cv2.imread(str(folder / "images_ss/0.png"), cv2.IMREAD_UNCHANGED)
        assert labels.shape == (40, 48) and labels.max() < 3 and (folder / "images_ss/0_blend.jpg").is_file()
        call(miou, folder, "folder", *CPU, "--multiscale", "--frac-dataset", "0.5")
        assert (folder / "scores_ms.yml").is_file()


def test_a_file_of_scores_has_one_entry_per_conditions(run, tmp_path, call, refused):
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    file = folder / "scores_ss.yml"
    file.write_text("mean_iou: 12.5\npatch_type: pure\n")  # of an older version, which kept the last call alone
    old, base = {"mean_iou": 12.5, "patch_type": "pure"}, ["folder", "--num-workers", 0, *CPU]
    settings = {
        "patch_type": (["--patch-type", "pure"], "pure"),
        "threshold": (["--threshold", 0.9], 0.9),
        "image_size": (["--im-size", 16], 16),
        "n_images": (["--max-images", 1], 1),
        "window_stride": (["--window-stride", 16], [16, 16]),
        "precision": (["--amp"], "bfloat16"),
    }
    call(miou, folder, *base)
    for options, _ in settings.values():
        call(miou, folder, *base, *options)
    first, *entries = yaml.safe_load(file.read_text())
    assert first == old and len(entries) == 1 + len(settings)
    own = entries[0]["conditions"]
    assert own["checkpoint"] == "checkpoint.pth" and own["patch_type"] == "graph" and own["precision"] == "float32"
    for (key, (_, value)), entry in zip(settings.items(), entries[1:], strict=True):
        assert entry["conditions"][key] == value != own[key]
    call(miou, folder / "checkpoint.pth", *base, *settings["image_size"][0])  # the same file, by another name
    again = yaml.safe_load(file.read_text())
    assert again == [first, *(entry for entry in entries if entry["conditions"]["image_size"] != 16), entries[3]]
    for text in ("[", "- 1\n"):
        file.write_text(text)
        assert "scores_ss.yml" in refused(miou, folder, *base) and file.read_text() == text


def test_the_precision_of_a_run_is_its_own_unless_another_is_asked_for(runs, monkeypatch, call):
    seen, real = [], Run.evaluate
    monkeypatch.setattr(Run, "evaluate", lambda run, *a, **k: seen.append(run.precision.dtype) or real(run, *a, **k))
    for folder, *options in ((runs["amp"],), (runs["amp"], "--no-amp"), (runs["float32"], "--amp")):
        call(test, folder, *CPU, *options)
        call(miou, folder, "folder", *CPU, *options)
    assert seen == 2 * [torch.bfloat16] + 2 * [None] + 2 * [torch.bfloat16]


def test_merging_comes_from_the_checkpoint_and_options_override_it(run, monkeypatch, call):
    seen, real = [], patch.apply

    def apply(model, method, **options):
        real(model, method, **options)
        keys = ("layers", "threshold", "attention", "batch")
        seen.append((method, {key: patch.options(model)[key] for key in keys} if patch.is_patched(model) else {}))
        return model

    monkeypatch.setattr(patch, "apply", apply)
    call(test, run, *CPU)
    call(test, run, *CPU, "--threshold", "0.9", "--iprop-attn", "--batch-mode", "uniform")
    call(test, run, *CPU, "--selected-layers", "2")
    call(test, run, *CPU, "--patch-type", "pure")
    saved = {"layers": (1,), "threshold": 0.5, "attention": "proportional", "batch": "ragged"}
    assert seen == [
        ("graph", saved),
        ("graph", saved | {"threshold": 0.9, "attention": "inverse", "batch": "uniform"}),
        ("graph", saved | {"layers": (2,)}),
        ("pure", {}),
    ]


def test_photographs_without_labels(run, folder_data, tmp_path, call):
    output = call(inference, run, "-i", folder_data / "images/val", "-o", tmp_path / "out", *CPU)
    assert "2 photographs" in output
    for name in ("0", "1"):
        labels = cv2.imread(str(tmp_path / f"out/{name}.png"), cv2.IMREAD_UNCHANGED)
        assert (labels == Run.load(run, device="cpu").predict(folder_data / f"images/val/{name}.jpg")).all()
        assert cv2.imread(str(tmp_path / f"out/{name}_blend.jpg")).shape == (40, 48, 3)
    assert "not read" not in output


def test_files_that_inference_does_not_read_are_named(run, folder_data, tmp_path, call):
    for name in ("phone.HEIC", "phone2.heic", ".hidden", "notes"):
        (folder_data / "images/val" / name).write_bytes(b"-")
    output = call(inference, run, "-i", folder_data / "images/val", "-o", tmp_path / "out", *CPU)
    assert "2 photographs" in output and "not read: .heic (2), no suffix (1); photographs are .jpg" in output


def test_the_golden_checkpoint_runs_through_the_commands(call):
    for options in ([], ["--patch-type", "graph", "--threshold", "0.9"]):
        assert "mean_iou" in call(test, DATA, "--max-images", "2", *CPU, *options)


@pytest.mark.slow
def test_measuring_takes_any_images_and_scoring_only_its_own_classes(folder_data, tmp_path, run, call, refused):
    """The golden model has 11 classes, the user's own data 3."""
    measuring = [
        (speedtest, "--warmup", 0, "--repeats", 1),
        (flops,),
        (profile_model, "--out", tmp_path / "trace.json"),
    ]
    measuring.append((token_stats, "--out", tmp_path / "stats", "--patch-type", "graph"))
    for source, count in (("folder", 2), (folder_data / "images", 6)):
        for command, *options in measuring:
            call(command, DATA, source, *CPU, *options)
        assert f"{count} images" in call(flops, DATA, source, *CPU)
    for command, *options in measuring:
        assert "nowhere" in refused(command, DATA, tmp_path / "nowhere", *CPU, *options)
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert "no photograph" in refused(command, DATA, tmp_path / "empty", *CPU, *options)
    assert "3 classes, the model 11" in refused(miou, DATA, "folder", *CPU)
    assert "3 classes, the model 11" in refused(tune, DATA, "folder", *CPU)
    assert "3 classes" in refused(report, DATA, "--dataset", "folder", "--out", tmp_path / "page.html", *CPU)
    assert "is not one of" in refused(miou, run, folder_data, *CPU)  # a path has no labels


def test_classes_that_changed_their_order_are_refused(run, folder_data, tmp_path, monkeypatch, call, refused):
    root = Path(shutil.copytree(folder_data, tmp_path / "data"))
    (root / "classes.yml").write_text(yaml.safe_dump(["wall", "floor", "door"]))
    monkeypatch.setenv("DATASET", str(root))
    for command, *options in (
        (test,),
        (miou, "folder"),
        (tune, "folder"),
        (report, "--out", root / "a.html"),
    ):
        message = refused(command, run, *options, *CPU)
        assert "wall, floor, door" in message and "floor, wall, door" in message
    assert "GFLOPs" in call(flops, run, "folder", *CPU)


@pytest.fixture
def toy():
    """A method with an option and a learned part."""
    calls = []

    def merge(step):
        calls.append((step.layer, step.options["spare"], step.block.weight.item()))
        n_images, n_tokens = step.x.shape[:2]
        groups = torch.arange(n_tokens).clamp(max=step.options["spare"] - 1).expand(n_images, -1)
        return Grouping.of_counts(groups, torch.full((n_images,), step.options["spare"]), step.sizes)

    def modules(encoder, blocks):
        for block in blocks:
            block.weight = torch.nn.Parameter(torch.ones(1))

    patch.register("toy", merge, layers=(2,), modules=modules, spare=patch.Option(3, "Tokens that are left."))
    yield calls
    del patch.METHODS["toy"]


@pytest.mark.slow
def test_a_registered_method_is_offered_by_every_command(run, toy, folder_data, tmp_path, call, refused):
    trained = tmp_path / "toy"
    call(train, "--log-dir", trained, "--dataset", "folder", *TINY, "--patch-type", "toy", "--spare", "5")
    data = read_variant(trained)["dataset_kwargs"]
    assert (data["patch_type"], data["spare"]) == ("toy", 5) and {keep for _, keep, _ in toy} == {5}
    toy.clear()
    call(test, trained, *CPU)
    assert {(layer, keep) for layer, keep, _ in toy} == {(2, 5)}
    toy.clear()
    keep = ["--spare", "4", "--selected-layer", "1", *CPU]
    call(miou, trained, "folder", *keep)
    assert "| toy --spare 4 --selected-layer 1 | 4.0 |" in call(
        speedtest, trained, "folder", *CPU, "--compare", "pure,toy --spare 4 --selected-layer 1", "--warmup", "1"
    )
    assert "GFLOPs" in call(flops, trained, "folder", *keep)
    assert "4.0" in call(token_stats, trained, "folder", *keep, "--out", tmp_path / "stats")
    assert "merging" in call(profile_model, trained, "folder", *keep, "--out", tmp_path / "trace.json")
    image = folder_data / "images/val/0.jpg"
    call(show_attn_map, trained, image, tmp_path / "pictures", "--layer-id", "1", *keep)
    call(inference, trained, "-i", folder_data / "images/val", "-o", tmp_path / "out", *keep)
    assert {(layer, keep) for layer, keep, _ in toy} == {(1, 4)}
    tuning = ["--methods", "toy --spare 4 --selected-layer 1", "--precision", "float32", "--minutes", 1e-9, *CPU]
    assert "settings of pure, toy" in call(tune, trained, "folder", *tuning)
    page = ["--max-images", 1, "--cost-images", 1, "--pictures", 1, "--explore", 0, "--out", tmp_path / "page.html"]
    call(report, trained, f"four={trained} --spare 4", *page, *CPU)
    rows = json.loads((tmp_path / "page.json").read_text())["rows"]
    assert [(row["tokens"], row["settings"]["spare"]) for row in rows] == [(5, 5), (4, 4)]
    assert refused(test, run, *CPU, "--patch-type", "toy")  # its learned part is missing


class TestRefused:
    def test_photographs_are_not_overwritten(self, run, folder_data, refused):
        photographs = folder_data / "images/val"
        before = {file.name: file.read_bytes() for file in photographs.iterdir()}
        assert "overwrite" in refused(inference, run, "-i", photographs, "-o", photographs)
        assert {file.name: file.read_bytes() for file in photographs.iterdir()} == before

    def test_pictures_that_cannot_be_written(self, run, folder_data, tmp_path, refused):
        (tmp_path / "0.png").mkdir()
        assert "cannot write" in refused(inference, run, "-i", folder_data / "images/val", "-o", tmp_path)

    def test_a_variant_without_data(self, run, tmp_path, refused):
        variant = read_variant(run)
        del variant["dataset_kwargs"]
        write_variant(variant, tmp_path)
        (tmp_path / "checkpoint.pth").write_bytes((run / "checkpoint.pth").read_bytes())
        assert "dataset" in refused(test, tmp_path, "--device", "cpu")

    def test_checkpoints(self, run, tmp_path, refused):
        assert "nowhere" in refused(test, tmp_path / "nowhere")
        (tmp_path / "variant.yml").write_text((run / "variant.yml").read_text())
        (tmp_path / "checkpoint.pth").write_bytes(b"damaged")
        assert "damaged" in refused(test, tmp_path)

    def test_photographs(self, run, tmp_path, refused):
        assert "nowhere" in refused(inference, run, "-i", tmp_path / "nowhere", "-o", tmp_path / "out")
        (tmp_path / "in").mkdir()
        assert "no photograph" in refused(inference, run, "-i", tmp_path / "in", "-o", tmp_path / "out")
        (tmp_path / "in/a.png").write_bytes(b"")
        assert "a.png" in refused(inference, run, "-i", tmp_path / "in", "-o", tmp_path / "out")


@pytest.mark.parametrize("how", by_speed(["segm/train.py", "-m segm.eval.miou"], slow=["segm/train.py"]))
def test_commands_run_as_files_and_as_modules(how):
    """That no file of segm/ shadows a module, which a file alone can meet, holds for all in test_architecture."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, *how.split(), "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0 and "--patch-type" in result.stdout and result.stderr == ""


@pytest.mark.nightly
def test_two_processes_score_like_one_in_mixed_precision(runs, forked, folder_data, tmp_path, call):
    """gloo: every image is counted once. In float32: test_train.py."""
    data = {"DATASET": str(folder_data)}
    for process in forked.together(2, "segm.test", runs["amp"], *CPU, output=tmp_path / "two", **data):
        process.join(300)
        assert process.exitcode == 0, printed(tmp_path / "two")
    assert printed(tmp_path / "two")[0] == call(test, runs["amp"], *CPU)
