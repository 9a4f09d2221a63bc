"""Machines, files and sizes that a training or a prediction does not expect: right, or one line that says why."""

import errno
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import click
import cv2
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from segm import inference, parallel, runlog, test, train
from segm.checkpoint import load_checkpoint
from segm.data import create_dataset
from segm.model.factory import create_segmenter
from segm.resolve import resolve
from segm.run import Run
from segm.trainer import Trainer
from tests.helpers import read_variant

ROOT = Path(__file__).parents[2]
SMALL = {
    "dataset": "folder", "backbone": "vit_tiny_patch16_384", "patch_size": 8, "d_model": 32, "n_heads": 2,
    "n_layers": 2, "im_size": 32, "crop_size": 32, "batch_size": 2, "epochs": 1, "learning_rate": 0.01,
    "num_workers": 0,
}  # fmt: skip


def trainer(folder, said=None, resume=False, **settings):
    lines = [] if said is None else said
    return Trainer(resolve(SMALL | settings), folder, device="cpu", weights=False, resume=resume, say=lines.append)


def write_images(root, seed=0, n=3, size=(32, 40)):
    random = np.random.default_rng(seed)
    for split in ("train", "val"):
        for index in range(n):
            for kind, shape, top in (("images", (*size, 3), 256), ("annotations", size, 2)):
                file = root / kind / split / f"{index}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(random.integers(0, top, shape, np.uint8)).save(file)
    (root / "classes.yml").write_text("[a, b]")


@pytest.fixture
def data(tmp_path, monkeypatch):
    write_images(tmp_path / "data")
    monkeypatch.setenv("DATASET", str(tmp_path / "data"))
    return tmp_path / "data"


# ------------------------------------------------------------------------------------------- the machine


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is out of shared memory."),
    ],
)
def test_memory_that_is_missing_is_said_in_a_line(error, shapes_run, refused, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Run, "evaluate", fail)
    assert "give a smaller --batch-size" in refused(test, shapes_run, "--device", "cpu")


def test_other_errors_keep_their_traceback(shapes_run, call, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(Run, "evaluate", fail)
    with pytest.raises(RuntimeError, match="ours"):
        call(test, shapes_run, "--device", "cpu")


def test_workers_are_as_many_as_shared_memory_takes(monkeypatch, caplog):
    monkeypatch.setattr(parallel.shutil, "disk_usage", lambda _: SimpleNamespace(free=10 << 20))
    assert parallel.fitting_workers(4, 1 << 10) == 4 and not caplog.messages
    assert parallel.fitting_workers(4, 1 << 20) == 3
    assert parallel.fitting_workers(4, 1 << 24) == 0
    assert "0 processes read images, not 4" in caplog.messages[-1] and "--shm-size" in caplog.messages[-1]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_file_systems_without_locks_are_written_to(number, tmp_path, monkeypatch, caplog):
    class Lock:
        def __init__(self, *_, **__):
            raise OSError(number, "no locks")

    monkeypatch.setattr(runlog, "FileLock", Lock)
    with caplog.at_level(logging.WARNING), runlog.run_lock(tmp_path):
        assert "no locks" in caplog.text


def test_other_errors_of_a_lock_are_raised(tmp_path, monkeypatch):
    class Lock:
        def __init__(self, *_, **__):
            raise OSError(errno.EACCES, "denied")

    monkeypatch.setattr(runlog, "FileLock", Lock)
    with pytest.raises(OSError, match="denied"), runlog.run_lock(tmp_path):
        pass


@pytest.mark.nightly
def test_names_that_a_terminal_cannot_print_are_escaped(data, tmp_path):
    (data / "classes.yml").write_text("[Straße, 道路]", encoding="utf-8")
    trainer(tmp_path / "run").fit()
    words = [sys.executable, "-m", "segm.eval.miou", str(tmp_path / "run"), "folder", "--device", "cpu"]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert ended.returncode == 0 and b"\\u9053\\u8def" in ended.stdout, ended.stderr
    assert "道路" in yaml.safe_load((tmp_path / "run/scores_ss.yml").read_text())[0]["per_class_iou"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n", "git lfs pull"),
        (b"<!doctype html>\n<html><head><title>Sign in</title>", "web page"),
        (b"", "empty"),
    ],
)
def test_what_lies_in_place_of_weights_is_named(tmp_path, suffix, content, word):
    (tmp_path / f"weights{suffix}").write_bytes(content)
    with pytest.raises(ValueError, match=word):
        load_checkpoint(tmp_path / f"weights{suffix}")


# ------------------------------------------------------------------------------------------- networks and sizes


def test_blocks_of_another_kind_are_named():
    net = {"backbone": "vit_base_patch16_xp_224", "n_cls": 2, "decoder": {"name": "linear"}}
    with pytest.raises(ValueError, match="ParallelScalingBlock"), torch.device("meta"):
        create_segmenter(net)
    with pytest.raises(ValueError, match="ParallelScalingBlock"):
        resolve(SMALL | {"backbone": "vit_base_patch16_xp_224"})


def test_crops_below_a_patch_are_refused():
    with pytest.raises(ValueError, match=r"--crop-size 4: a patch alone has 8"):
        resolve(SMALL | {"crop_size": 4})


@pytest.mark.parametrize("size", [(2, 900), (900, 2), (1, 1)])
def test_thin_images_are_trained_on(data, tmp_path, size):
    write_images(data, size=size)
    dataset = create_dataset("folder", "train", image_size=32, crop_size=32)
    assert all(dataset[(0, index)]["image"].shape == (3, 32, 32) for index in range(3))


def test_a_photograph_without_pixels_is_refused(shapes_run):
    run = Run.load(shapes_run, device="cpu")
    for shape in ((0, 9, 3), (9, 0, 3)):
        with pytest.raises(ValueError, match="a photograph is an array"):
            run.predict(np.zeros(shape, np.uint8))


def test_positions_are_embedded_on_the_padded_grid():
    net = resolve({"dataset": "shapes", "backbone": "vit_small_patch14_dinov2", "im_size": 512, "crop_size": 512}).net
    assert net.image_size == (518, 518)
    config = resolve(SMALL | {"crop_size": (20, 36)})
    assert config.net.image_size == (24, 40) and config.grid == (3, 5)


def test_budgets_are_checked_for_the_size_in_force(shapes_run):
    assert Run.load(shapes_run, device="cpu", patch_type="graph", tokens=12).method == "graph"  # of 16
    with pytest.raises(ValueError, match="12"):
        Run.load(shapes_run, device="cpu", im_size=16, patch_type="graph", tokens=12)  # of 4
    run = Run.load(shapes_run, device="cpu")
    with pytest.raises(ValueError, match="12"):
        run.with_settings("graph", {"tokens": 12}, patch_size=16)


# ------------------------------------------------------------------------------------------- photographs


def test_large_photographs_are_predicted_as_they_are(shapes_run):
    """Tile by tile, what a mosaic of images is predicted as is that of its tiles."""
    images = [create_dataset("shapes", "val", image_size=(32, 32), length=4).load(index).image for index in range(4)]
    mosaic = np.vstack([np.hstack(images[:2]), np.hstack(images[2:])])
    run = Run.load(shapes_run, device="cpu", scale="original")
    found = run.predict(mosaic)
    tiles = [run.predict(image) for image in images]
    assert (found == np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])).all()
    assert run.preprocess(mosaic).shape == (1, 3, 64, 64)
    assert Run.load(shapes_run, device="cpu").preprocess(mosaic).shape == (1, 3, 32, 32)
    whole = Run.load(shapes_run, device="cpu", scale="original", window_size=64)
    assert whole.windows.size == (64, 64) and whole.predict(mosaic).shape == (64, 64)
    with pytest.raises(ValueError, match="--im-size"):
        Run.load(shapes_run, device="cpu", scale="original", im_size=64)


def test_commands_take_the_original_scale(shapes_run, tmp_path, call):
    (tmp_path / "in/deeper").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    for name in ("a.png", "deeper/b.png"):
        Image.fromarray(pixels).save(tmp_path / "in" / name)
    words = (shapes_run, "-i", tmp_path / "in", "--device", "cpu", "--num-workers", "0")
    call(inference, *words, "-o", tmp_path / "out", "--scale", "original")
    expected = Run.load(shapes_run, device="cpu", scale="original").predict(pixels)
    for name in ("a.png", "deeper/b.png"):
        assert (np.asarray(Image.open(tmp_path / "out" / name)) == expected).all()


def test_scores_at_the_original_scale_are_others(data, tmp_path, call):
    write_images(data, size=(64, 80))
    trainer(tmp_path / "run").fit()
    words = (tmp_path / "run", "--device", "cpu")
    assert len({call(test, *words, *more) for more in ((), ("--scale", "original"), ("--window-size", "16"))}) == 3


# ------------------------------------------------------------------------------------------- resumed runs


def test_a_resumed_run_says_that_its_images_or_its_schedule_are_others(data, tmp_path):
    trainer(tmp_path / "run").fit()
    for epochs, seed, expected in ((2, 0, ["schedule"]), (2, 0, []), (3, 1, ["images", "schedule"])):
        write_images(data, seed, n=3 + seed)
        said = []
        trainer(tmp_path / "run", said, resume=True, epochs=epochs).fit()
        warnings = [line for line in said if line.startswith("warning: the")]
        assert len(warnings) == len(expected), said
        assert all(word in line for word, line in zip(expected, warnings, strict=True))


def test_pixels_of_16_bits_keep_their_range_in_a_run(data, tmp_path):
    for file in (data / "images").rglob("*.png"):
        cv2.imwrite(str(file), cv2.imread(str(file)).astype(np.uint16) * 16)
    trainer(tmp_path / "run", mean=(0.2, 0.3, 0.4), std=(0.1, 0.2, 0.3)).fit()
    variant = read_variant(tmp_path / "run")
    assert variant["dataset_kwargs"]["value_range"] == [0, 4095] and variant["net_kwargs"]["mean"] == [0.2, 0.3, 0.4]
    run = Run.load(tmp_path / "run", device="cpu")
    photo = tmp_path / "dark.png"
    cv2.imwrite(str(photo), np.full((32, 32, 3), 100, np.uint16))
    expected = (round(100 * 255 / 4095) / 255 - torch.tensor([0.2, 0.3, 0.4])) / torch.tensor([0.1, 0.2, 0.3])
    torch.testing.assert_close(run.preprocess(photo)[0, :, 0, 0], expected)


def test_a_command_line_with_a_wrong_size_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(click.ClickException, match="3 numbers"):
        train.main.make_context("train", ["--log-dir", str(tmp_path), "--crop-size", "1", "2", "3"])
