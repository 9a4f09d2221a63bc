"""The data sets that are read from files, each built in its real folder structure."""

import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segm.data import IGNORE_LABEL, class_info, create_dataset, dataset_defaults, fingerprint

CAMVID = Path(__file__).parents[3] / "shared" / "data"

# name: (folder below a common root, images, labels, suffixes, labels in the file -> labels expected)
SHIFTED = {0: 255, 1: 0, 150: 149, 255: 255}
KEPT = {0: 0, 18: 18, 255: 255}
SETS = {
    "ade20k": ("ade20k", "images/training", "annotations/training", (".jpg", ".png"), SHIFTED),
    "cityscapes": (
        "cityscapes", "leftImg8bit/train/ulm", "gtFine/train/ulm",
        ("_leftImg8bit.png", "_gtFine_labelTrainIds.png"), KEPT),
    "pascal_context": (
        "VOCdevkit/VOC2010", "JPEGImages", "SegmentationClassContext", (".jpg", ".png"),
        {0: 0, 59: 59, 255: 255}),
    "coco_stuff": (
        "coco_stuff10k", "images/train2014", "annotations/train2014", (".jpg", "_labelTrainIds.png"),
        {0: 255, 1: 0, 171: 170}),
    "coco_stuff164k": (
        "coco_stuff164k", "images/train2017", "annotations/train2017", (".jpg", "_labelTrainIds.png"),
        {0: 0, 170: 170, 255: 255}),
    "camvid": ("camvid", "images/train", "annotations/train", (".jpg", ".png"), {0: 0, 10: 10, 11: 255}),
    "suim": ("SUIM", "images/train", "annotations/train", (".jpg", ".png"), {0: 0, 7: 7, 255: 255}),
    "rumexweeds": ("rumexweeds", "images/train", "annotations/train", (".png", ".png"), {0: 0, 2: 2, 255: 255}),
    "folder": ("", "images/train", "annotations/train", (".jpg", ".png"), {0: 0, 2: 2, 255: 255}),
}  # fmt: skip


def write(path: Path, pixels: np.ndarray) -> None:
    """pixels: RGB or labels"""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)


def labels(values, shape=(48, 64)) -> np.ndarray:
    return np.resize(np.array(list(values), np.uint8), shape)


def red(shape=(48, 64)) -> np.ndarray:
    return np.broadcast_to(np.array([255, 0, 0], np.uint8), (*shape, 3)).copy()


def build(root: Path, name: str, names=("a", "b"), values=None) -> Path:
    """A tiny data set; returns its own folder."""
    own, images, maps, (image_suffix, map_suffix), mapping = SETS[name]
    own = root / own
    for stem in names:
        write(own / images / f"{stem}{image_suffix}", red())
        write(own / maps / f"{stem}{map_suffix}", labels(values or mapping))
    if name == "pascal_context":
        lists = own / "ImageSets" / "SegmentationContext"
        lists.mkdir(parents=True)
        (lists / "train.txt").write_text("\n".join(names))
    if name == "folder":
        (own / "classes.yml").write_text("[sky, road, tree]")
    return own


def test_samples_and_items(tmp_path, monkeypatch):
    for name, (*_, mapping) in SETS.items():
        own = build(tmp_path / name, name)
        monkeypatch.setenv("DATASET", str(tmp_path / name))
        ds = create_dataset(name, "train", crop_size=64)
        assert len(ds) == 2 and ds.name == name and ds.split == "train"
        assert ds.n_cls == len(ds.classes) == len(ds.palette) == (dataset_defaults(name)["n_cls"] or 3)
        sample = ds[0]
        assert sample.name.rsplit("/", 1)[-1] == "a"
        assert sample.image.shape == (48, 64, 3) and sample.image.dtype == np.uint8
        assert sample.image[..., 0].min() > 250 and sample.image[..., 1:].max() < 5  # red, not blue
        assert np.array_equal(sample.label, labels(mapping.values()))
        item = ds[(0, 1)]
        assert item["image"].shape == (3, 64, 64) and item["label"].dtype == torch.int64
        assert set(item["label"].unique().tolist()) <= {*mapping.values(), IGNORE_LABEL}
        assert len(create_dataset(name, "train", root=own)) == 2


def test_large_sets_use_the_same_files(tmp_path):
    for name in ("ade20k", "cityscapes"):
        build(tmp_path / name, name)
        ds = create_dataset(f"{name}_large", "train", root=tmp_path / name)
        assert len(ds) == 2 and ds.crop_size == (dataset_defaults(f"{name}_large")["crop_size"],) * 2


def test_ade20k_folders(tmp_path):
    data = build(tmp_path, "ade20k")
    for folder in ("one/ADEChallengeData2016", "two/ade/ADEChallengeData2016"):
        (tmp_path / folder).parent.mkdir(parents=True)
        data = data.rename(tmp_path / folder)
        assert len(create_dataset("ade20k", "train", root=tmp_path / folder.split("/")[0])) == 2


def test_cityscapes_test_split_has_no_labels(tmp_path):
    write(tmp_path / "leftImg8bit/test/bonn/x_leftImg8bit.png", red())
    ds = create_dataset("cityscapes", "test", root=tmp_path)
    assert ds[0].label is None and ds[0].name == "bonn/x"
    with pytest.raises(ValueError, match="no labels"):
        ds[(0, 0)]


def test_red_stays_red_in_training(tmp_path):
    """Photometric distortion shifts the hue by 36 degrees at most: red keeps leading blue."""
    build(tmp_path, "camvid")
    ds = create_dataset("camvid", "train", root=tmp_path)
    for epoch in range(10):
        item = ds[(epoch, 0)]
        inside = item["label"] != IGNORE_LABEL
        channels = item["image"][:, inside].mean(1)
        assert channels[0] > channels[1] and channels[0] > channels[2] + 0.2


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


def test_missing_files_are_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("DATASET", raising=False)
    for name in SETS:
        with pytest.raises(FileNotFoundError, match="set DATASET") as error:
            create_dataset(name, "train")
        one_line(error)
        with pytest.raises(FileNotFoundError, match="set DATASET") as error:
            create_dataset(name, "train", root=tmp_path)
        assert str(tmp_path) in one_line(error)


def test_missing_empty_and_unknown_splits(tmp_path):
    own = build(tmp_path, "camvid")
    with pytest.raises(FileNotFoundError, match="images/val does not exist") as error:
        create_dataset("camvid", "val", root=tmp_path)
    one_line(error)
    (own / "images" / "val").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no image .*images/val.*\.png.*found: no file") as error:
        create_dataset("camvid", "val", root=tmp_path)
    one_line(error)
    with pytest.raises(ValueError, match="train, val, test"):
        create_dataset("camvid", "dev", root=tmp_path)


def test_wrong_label(tmp_path):
    limits = {"ade20k": (151, "0 to 150"), "camvid": (12, "0 to 10, and 11, 255"), "cityscapes": (33, "0 to 18")}
    for name, (value, allowed) in (limits | {"folder": (3, "0 to 2")}).items():
        build(tmp_path / name, name, values=[1, value])
        ds = create_dataset(name, "train", root=tmp_path / name)
        for item in (0, (0, 0)):
            with pytest.raises(ValueError, match=f"label {value} .*{allowed}") as error:
                ds[item]
            assert "annotations" in one_line(error) or "gtFine" in str(error.value)


@pytest.fixture
def own(tmp_path):
    """The user's own data: a data set, and the folder that it reads."""
    build(tmp_path, "folder")
    return create_dataset("folder", "train", root=tmp_path), tmp_path


def test_masks_of_16_bits(own):
    ds, root = own
    write(root / "annotations/train/a.png", np.full((48, 64), 257, np.uint16))
    with pytest.raises(ValueError, match="label 257"):
        ds[0]  # not cut to 8 bits
    write(root / "annotations/train/a.png", np.full((48, 64), 2, np.uint16))
    assert (ds[0].label == 2).all()


def test_wrong_mask(own):
    ds, root = own
    for mask, message in ((labels([0], (40, 64)), "64x40 pixels, its image 64x48"), (red(), "one channel")):
        write(root / "annotations/train/a.png", mask)
        with pytest.raises(ValueError, match=message) as error:
            ds[0]
        assert "annotations/train/a.png" in one_line(error)


def test_damaged_files(own):
    ds, root = own
    for part in ("images/train/a.jpg", "annotations/train/a.png"):
        path = root / part
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) * 3 // 4], b"", b"<html>not found</html>", None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            for item in (0, (0, 0)):
                with pytest.raises(FileNotFoundError if damaged is None else ValueError) as error:
                    ds[item]
                assert part in one_line(error)
        path.write_bytes(whole)


def test_data_after_the_end_of_a_jpeg_is_fine(own):
    ds, root = own
    path = root / "images/train/a.jpg"
    path.write_bytes(path.read_bytes() + b"\xff\xda" + bytes(100_000))
    assert ds[0].image.shape == (48, 64, 3)


def flat_folder(root: Path, count: int, classes="[a, b]") -> Path:
    for k in range(count):
        suffix = (".jpg", ".JPG", ".jpeg", ".png")[k % 4]
        write(root / "images" / f"n{k:02d}{suffix}", red((8, 8)))
        write(root / "annotations" / f"n{k:02d}.png", labels([0, 1], (8, 8)))
    (root / "classes.yaml").write_text(classes)
    return root


def sample_names(root: Path, split: str) -> list[str]:
    return [sample.name for sample in create_dataset("folder", split, root=root)]


def test_folder_with_split_files(tmp_path):
    flat_folder(tmp_path, 6)
    (tmp_path / "train.txt").write_text("n03\nn01\n\n")
    (tmp_path / "val.txt").write_text("n00\n")
    assert sample_names(tmp_path, "train") == ["n03", "n01"] and sample_names(tmp_path, "val") == ["n00"]
    with pytest.raises(FileNotFoundError, match="no split 'test'"):
        create_dataset("folder", "test", root=tmp_path)
    (tmp_path / "val.txt").write_text("nosuch\n")
    with pytest.raises(FileNotFoundError, match="nosuch"):
        create_dataset("folder", "val", root=tmp_path)


def test_folder_without_splits_keeps_a_tenth_for_val(tmp_path):
    flat_folder(tmp_path, 20)
    train, val = (sample_names(tmp_path, split) for split in ("train", "val"))
    assert len(train) == 18 and len(val) == 2 and not set(train) & set(val)
    assert val == sample_names(tmp_path, "val")


def test_folder_class_list(tmp_path):
    build(tmp_path, "folder")
    entries = (
        "[{id: 1, name: b, color: [4, 5, 6]}, {id: 0, name: a, color: [1, 2, 3]}, {id: 2, name: c, color: [7, 8, 9]}]"
    )
    (tmp_path / "mine.yml").write_text(entries)
    ds = create_dataset("folder", "train", root=tmp_path, classes=tmp_path / "mine.yml")
    assert ds.classes == ("a", "b", "c") and ds.palette.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


WRONG_CLASSES = {
    "a: b": "YAML list", "[]": "YAML list", "[a, {name: b}]": "names alone", "[{id: 0}]": "name",
    "[{id: 1, name: a}]": "ids", "[{id: 0, name: a, color: [1, 2]}]": "color", "[a": "YAML",
}  # fmt: skip


def test_colors_that_are_not_given_can_be_told_apart(tmp_path):
    """ΔE*ab of 20 is as that of two hues of green; black is what is ignored."""
    for n, least in ((12, 40), (40, 25)):
        (tmp_path / "classes.yml").write_text(str([f"class {index}" for index in range(n)]))
        palette = class_info("folder", tmp_path / "classes.yml")[1]
        assert len(palette) == n
        colors = np.vstack([palette, [(0, 0, 0)]]).astype(np.float32)[None] / 255
        lab = cv2.cvtColor(colors, cv2.COLOR_RGB2LAB)[0]
        distances = np.linalg.norm(lab[:, None] - lab, axis=-1) + 100 * np.eye(n + 1)
        assert distances.min() > least
    (tmp_path / "classes.yml").write_text(str([f"class {index}" for index in range(50)]))
    assert len(class_info("folder", tmp_path / "classes.yml")[1]) == 50


def test_wrong_class_list(tmp_path):
    build(tmp_path, "folder")
    for text, message in WRONG_CLASSES.items():
        (tmp_path / "classes.yml").write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            create_dataset("folder", "train", root=tmp_path)
        assert "classes.yml" in one_line(error)


def test_missing_class_list(tmp_path):
    build(tmp_path, "folder")
    (tmp_path / "classes.yml").unlink()
    with pytest.raises(FileNotFoundError, match="class list"):
        create_dataset("folder", "train", root=tmp_path)


def test_fingerprints(tmp_path):
    """All that items depend on is part of it: files, classes, and every setting of the images."""
    root, settings = tmp_path / "data", {"image_size": 48, "crop_size": 32}
    build(root, "folder")

    def found(*conditions, split="train", **more):
        return fingerprint(create_dataset("folder", split, root=root, **settings | more), *conditions)

    first = found()
    assert first == found() == found(crop_size=(32, 32)) and len(first) == 16
    different = [found("bfloat16"), found(image_size=40), found(crop_size=(32, 40)), found(normalization="deit")]
    different += [found(seed=1), found(ratios=(0.5, 1.5)), found(flip=False)]
    (root / "classes.yml").write_text("[sky, tree, road]")
    different.append(found())
    (root / "classes.yml").write_text("[{name: sky, color: [1, 1, 1]}, {name: tree, color: [2, 2, 2]}]")
    different.append(found())  # masks may be pictures now
    (root / "classes.yml").write_text("[sky, road, tree]")
    shutil.copytree(root, tmp_path / "copy")
    root = tmp_path / "copy"
    assert found() == first  # wherever it is
    mask, image = root / "annotations/train/a.png", root / "images/train/b.jpg"
    content, date = mask.read_bytes(), mask.stat().st_mtime_ns
    os.utime(mask, ns=(date, date + 1))
    different.append(found())
    mask.write_bytes(content + b" ")
    os.utime(mask, ns=(date, date))
    different.append(found())
    image.rename(image.with_name("c.jpg"))
    mask.with_name("b.png").rename(mask.with_name("c.png"))
    different.append(found())
    assert len({first, *different}) == 1 + len(different)
    mask.unlink()
    with pytest.raises(FileNotFoundError, match=r"annotations/train/a\.png"):
        found()


def test_workers_change_nothing_with_files(tmp_path):
    build(tmp_path, "camvid")
    ds = create_dataset("camvid", "train", root=tmp_path, image_size=48, crop_size=32)
    order = [(0, 0), (0, 1), (1, 1), (1, 0)]
    alone, both = (list(DataLoader(ds, sampler=order, num_workers=workers)) for workers in (0, 2))
    for a, b in zip(alone, both, strict=True):
        assert torch.equal(a["image"], b["image"]) and torch.equal(a["label"], b["label"])


@pytest.mark.skipif(not (CAMVID / "camvid").is_dir(), reason="CamVid is not there")
def test_real_camvid():
    sets = {split: create_dataset("camvid", split, root=CAMVID) for split in ("train", "val", "test")}
    assert {split: len(ds) for split, ds in sets.items()} == {"train": 367, "val": 101, "test": 233}
    sample, item = sets["val"][0], sets["train"][(0, 0)]
    assert sample.image.shape == (360, 480, 3) and sample.label.shape == (360, 480)
    assert set(np.unique(sample.label)) <= {*range(11), IGNORE_LABEL}
    assert item["image"].shape == (3, 352, 352)
    assert sets["val"].view(sample.image).shape == (3, 360, 480)
