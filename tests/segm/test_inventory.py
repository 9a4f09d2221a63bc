"""Data that people bring: what is refused, what is named as suspicious, what is taken."""

import importlib.util
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from PIL import Image

from segm import train
from segm.data import create_dataset, spread
from segm.data.images import read_image
from segm.data.inventory import inspect_dataset
from segm.runlog import read_log
from tests.helpers import read_variant

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 40, 48
NETWORK = ["--backbone", "vit_tiny_patch16_384", "--no-pretrained", "--device", "cpu", "--num-workers", "0"]
NETWORK += ["--im-size", "32", "--crop-size", "32", "--d-model", "32", "--n-heads", "2", "--n-layers", "2"]
COLORS = [[128, 0, 0], [0, 128, 0], [0, 0, 128]]


def mask_of(*values):
    """A mask of the left half, the right half, and the upper third."""
    left, right, top = values
    mask = np.full((HEIGHT, WIDTH), left, np.uint8)
    mask[:, WIDTH // 2 :] = right
    mask[: HEIGHT // 3] = top
    return mask


def write(file, picture):
    file.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(file), picture)


@pytest.fixture
def bring(tmp_path, monkeypatch):
    """Write a data set of one mask for all images, below $DATASET; returns its folder."""

    def make(mask=None, classes="[a, b, c]", train="train", val="val", suffix=".jpg"):
        photo = cv2.cvtColor(mask_of(60, 120, 200), cv2.COLOR_GRAY2BGR)
        for split, count in ((train, 3), (val, 2)):
            for index in range(count):
                write(tmp_path / f"images/{split}/{index}{suffix}", photo)
                write(tmp_path / f"annotations/{split}/{index}.png", mask_of(0, 1, 2) if mask is None else mask)
        (tmp_path / "classes.yml").write_text(classes, encoding="utf-8")
        monkeypatch.setenv("DATASET", str(tmp_path))
        return tmp_path

    return make


def inspect(split="train"):
    return inspect_dataset(create_dataset("folder", split))


def test_labels_are_counted(bring):
    bring()
    found = inspect()
    assert (found.n_images, found.n_masks, found.sizes) == (3, 3, ((WIDTH, HEIGHT),) * 2)
    counts = np.bincount(mask_of(0, 1, 2).ravel())
    assert list(found.pixels.values()) == [3 * count for count in counts] and not found.ignored and not found.warnings
    assert yaml.safe_load(yaml.safe_dump(found.record()))["pixels"] == found.pixels


def test_masks_of_0_and_255_are_explained(bring):
    bring(mask_of(0, 255, 0), "[bg, fg]")
    (note,) = inspect().warnings
    assert "fg" in note and "no pixel" in note and "255" in note


def test_ignored_pixels_are_named(bring):
    bring(mask_of(255, 255, 0), "[a]")
    with pytest.raises(ValueError, match="one class"):
        inspect()
    bring(mask_of(255, 255, 0), "[a, b]")
    assert any("% of the pixels are ignored" in note for note in inspect().warnings)
    bring(mask_of(255, 255, 255))
    with pytest.raises(ValueError, match="no pixel is labelled"):
        inspect()


def test_split_folders_by_other_names(bring):
    bring(train="Training", val="validation")
    assert (inspect().n_images, inspect("val").n_images) == (3, 2)


def test_folders_that_look_like_splits_are_never_ignored(bring):
    bring(train="trainset", val="valset")
    for split in ("train", "val"):
        with pytest.raises(FileNotFoundError, match="trainset, valset"):
            inspect(split)


def test_a_split_that_the_program_makes_is_announced(bring):
    root = bring()
    for split in ("train", "val"):
        for file in (root / f"images/{split}").iterdir():
            file.rename(root / f"images/{split}_{file.name}")
            shutil.move(root / f"annotations/{split}/{file.stem}.png", root / f"annotations/{split}_{file.stem}.png")
        (root / f"images/{split}").rmdir()
    assert inspect().n_images + inspect("val").n_images == 5
    assert any("made by the program" in note for note in inspect().warnings)


def test_suffixes(bring):
    for suffix in (".TIF", ".png", ".bmp", ".webp", ".JPEG"):
        root = bring(suffix=suffix)
        (root / "images/train/._0.jpg").write_bytes(b"of the system")
        assert inspect().n_images == 3
        shutil.rmtree(root / "images")
    (root / "images/train").mkdir(parents=True)
    (root / "images/train/a.gif").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"\.png.*found: \.gif \(1\)"):
        inspect()


def test_files_of_one_name(bring):
    root = bring()
    shutil.copy(root / "images/train/0.jpg", root / "images/train/0.png")
    with pytest.raises(ValueError, match="suffix alone"):
        inspect()


@pytest.mark.parametrize("text", ["0.jpg\n1.jpg\n", "\ufeff0\r\n1\r\n", "0\n\n1.jpg"])
def test_lists(bring, text):
    root = bring()
    for kind in ("images", "annotations"):
        for file in (root / kind / "train").iterdir():
            file.rename(root / kind / file.name)
        shutil.rmtree(root / kind / "train")
        shutil.rmtree(root / kind / "val")
    (root / "train.txt").write_bytes(text.encode())
    assert inspect().n_images == 2
    (root / "train.txt").write_text("0\nnowhere\n")
    with pytest.raises(FileNotFoundError, match=r"'nowhere'.*found"):
        inspect()


def test_missing_and_wrong_masks_are_found_before_the_training(bring, tmp_path, refused):
    options = ["--log-dir", tmp_path / "run", "--dataset", "folder", "--backbone", "vit_tiny_patch16_384"]
    options += ["--no-pretrained", "--device", "cpu", "--im-size", "32", "--crop-size", "32", "--epochs", "1"]
    root = bring()
    write(root / "annotations/val/1.png", mask_of(9, 9, 9))
    assert "val/1.png: label 9" in refused(train, *options)
    write(root / "annotations/val/1.png", mask_of(0, 1, 2)[:20])
    assert "48x20" in refused(train, *options)
    (root / "annotations/val/1.png").unlink()
    assert "masks are missing" in refused(train, *options)
    (root / "annotations/val/1.png").write_bytes(b"no picture")
    assert "damaged" in refused(train, *options)
    assert not (tmp_path / "run").exists()


def test_orientations_are_reported(bring):
    root = bring()
    photo = Image.open(root / "images/train/0.jpg")
    exif = Image.Exif()
    exif[0x0112] = 3
    photo.save(root / "images/train/1.jpg", exif=exif)
    assert any("1 of 3 images have an EXIF orientation (mostly 3)" in note for note in inspect().warnings)
    exif[0x0112] = 6
    photo.save(root / "images/train/1.jpg", exif=exif)
    with pytest.raises(ValueError, match="EXIF orientation 6"):
        inspect()


def test_masks_in_the_colors_of_the_classes(bring):
    picture = np.array(COLORS, np.uint8)[mask_of(0, 1, 2)][..., ::-1]  # OpenCV writes BGR
    root = bring(picture)
    with pytest.raises(ValueError, match=r"one channel.*classes\.yml"):
        inspect()
    entries = [{"name": name, "color": color} for name, color in zip("abc", COLORS, strict=True)]
    (root / "classes.yml").write_text(yaml.safe_dump(entries))
    assert np.array_equal(create_dataset("folder", "train")[0].label, mask_of(0, 1, 2))
    (root / "classes.yml").write_text(yaml.safe_dump(entries[:2]))
    with pytest.raises(ValueError, match=r"colors of no class, such as \[0, 0, 128\]"):
        inspect()
    (root / "classes.yml").write_text(yaml.safe_dump([*entries[:2], entries[2] | {"id": 255, "name": "void"}]))
    assert np.array_equal(create_dataset("folder", "train")[0].label, mask_of(0, 1, 255))


def test_names_stay_text(bring):
    bring(classes="- no\n- 1\n- 2024-01-01")
    assert create_dataset("folder", "train").classes == ("no", "1", "2024-01-01")
    bring(classes="[a, b, a]")
    with pytest.raises(ValueError, match="twice"):
        inspect()


def test_a_run_keeps_its_classes(bring, tmp_path, call, refused, caplog):
    options = ["--log-dir", tmp_path / "run", "--dataset", "folder", *NETWORK, "--batch-size", "2"]
    root = bring()
    assert "train: 3 images" in call(train, *options, "--epochs", "1")
    assert read_variant(tmp_path / "run")["dataset_kwargs"]["inventory"]["val"]["images"] == 2
    (root / "classes.yml").write_text("[b, a, c]")
    message = refused(train, *options, "--resume", "--epochs", "2")
    assert "b, a, c" in message and "a, b, c" in message
    tuned = ["--log-dir", tmp_path / "tuned", "--finetune", tmp_path / "run", "--device", "cpu", "--epochs", "1"]
    with caplog.at_level("WARNING"):
        call(train, *tuned)  # what belongs to a class is not taken over by another one
    assert any("other classes" in record.message for record in caplog.records)


@pytest.mark.parametrize("settings", [(), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)])
def test_jpegs_that_are_cut_off_are_refused(tmp_path, settings):
    rng = np.random.default_rng(0)
    picture = cv2.GaussianBlur(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8), (0, 0), 3)
    content = cv2.imencode(".jpg", picture, [*settings])[1].tobytes()
    for length in np.linspace(0.3 * len(content), len(content) - 1, 12).astype(int):
        (tmp_path / "cut.jpg").write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.jpg: damaged"):
            read_image(tmp_path / "cut.jpg")
    (tmp_path / "whole.jpg").write_bytes(content + b"what a camera appends \xff\xda\xff\xd9")
    assert read_image(tmp_path / "whole.jpg").shape == (90, 120, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp", ".webp"])
def test_other_pictures_that_are_cut_off_are_refused(tmp_path, suffix):
    rng = np.random.default_rng(0)
    content = cv2.imencode(suffix, rng.integers(0, 256, (30, 40, 3), dtype=np.uint8))[1].tobytes()
    file = tmp_path / f"cut{suffix}"
    for length in np.linspace(0.3 * len(content), len(content) - 8, 12).astype(int):
        file.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.\w+: damaged") as error:
            read_image(file)
        assert "\n" not in str(error.value)
    file.write_bytes(content)
    assert read_image(file).shape == (30, 40, 3)


def test_pictures_above_pillows_limit_are_called_that(bring, monkeypatch):
    bring()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", HEIGHT * WIDTH // 2 - 1)
    with pytest.raises(ValueError, match=r"0\.jpg: the image has more pixels than are read, 1,918 at most: cut it"):
        inspect_dataset(create_dataset("folder", "train"))


def test_samples_are_spread():
    assert spread(5, 10) == [0, 2, 4, 6, 8] and spread(9, 3) == [0, 1, 2] == spread(None, 3) and spread(4, 0) == []
    assert len(set(spread(200, 1000))) == 200


def test_the_command_looks_at_all_splits(bring, call, refused):
    spec = importlib.util.spec_from_file_location("check_dataset", ROOT / "scripts/check_dataset.py")
    command = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(command)
    root = bring()
    output = call(command, "folder")
    assert "train: 3 images" in output and "val: 2 images" in output and "test: none" in output
    (root / "annotations/train/spare.png").write_bytes((root / "annotations/train/0.png").read_bytes())
    assert "warning: 1 masks belong to no image" in call(command, "folder")
    (root / "annotations/val/0.png").unlink()
    assert "val/0.png" in refused(command, "folder")
    assert "shapes" in refused(command, "shapes")


def test_bad_images_are_skipped_on_demand_and_counted(bring, tmp_path, call, refused, caplog):
    """One photograph is cut off, one mask is missing, one mask of the validation is no picture."""
    root = bring()
    photo = root / "images/train/0.jpg"
    photo.write_bytes(photo.read_bytes()[:300])
    (root / "annotations/train/1.png").unlink()
    (root / "annotations/val/1.png").write_bytes(b"no picture")
    options = ["--log-dir", tmp_path / "run", "--dataset", "folder", *NETWORK, "--epochs", "2", "--eval-freq", "1"]
    assert "annotations/train" in refused(train, *options)
    printed = call(train, *options, "--skip-bad-images", "--batch-size", "3")
    assert "images are skipped" in printed and "2 images skipped" in printed
    entries = read_log(tmp_path / "run/log.txt")
    assert [entry["skipped_images"] for entry in entries] == [2, 2]
    assert all(np.isfinite(entry["train_loss"]) and entry["train_loss"] > 0 for entry in entries)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "skipped" in said and "0.jpg" in said and "left out of the scores" in said and "val/1.png" in said
