"""The procedural data set and what every data set does: items, views, seeds, normalization."""

import pickle
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segm.config import config_dir, load_config
from segm.data import (
    DATASETS,
    IGNORE_LABEL,
    NORMALIZATION,
    class_info,
    create_dataset,
    dataset_defaults,
    normalize,
)


@pytest.fixture(scope="module")
def shapes():
    return create_dataset("shapes", "train", image_size=64, length=40)


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[key], b[key]) for key in ("image", "label"))


def run_python(code: str) -> subprocess.CompletedProcess:
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)


@pytest.mark.slow
def test_import_leaves_mmseg_alone_and_the_first_item_imports_it_silently():
    code = "import sys, segm.data as data; assert not {'mmseg', 'mmcv', 'mmengine'} & set(sys.modules)"
    result = run_python(f"{code}; data.create_dataset('shapes', 'train')[(0, 0)]; assert 'mmseg' in sys.modules")
    assert result.stdout == "" and result.stderr == ""


@pytest.mark.slow
def test_unpickled_in_a_new_process_prints_nothing(shapes, tmp_path):
    item = shapes[(0, 0)]
    (tmp_path / "ds.pkl").write_bytes(pickle.dumps(shapes))
    code = f"import pickle; ds = pickle.load(open({str(tmp_path / 'ds.pkl')!r}, 'rb')); a = ds[(0, 0)]"
    result = run_python(f"{code}; assert abs(a['image'].sum() - {item['image'].sum()}) < 0.1")
    assert result.stdout == "" and result.stderr == ""


def test_defaults_are_complete():
    keys = set(load_config("datasets")["ade20k"])
    for name in DATASETS:
        assert set(dataset_defaults(name)) == keys
    cityscapes = dataset_defaults("cityscapes")
    assert (cityscapes["im_size"], cityscapes["crop_size"], cityscapes["window_stride"]) == (1024, 768, 512)
    assert (config_dir() / "datasets.yml").is_file()


def test_errors_say_what_is_allowed():
    calls = [
        (lambda: create_dataset("nosuch", "train"), "ade20k"),
        (lambda: create_dataset("shapes", "trainval"), "train, val"),
        (lambda: create_dataset("shapes", "train", normalization="bgr"), "vit, deit"),
        (lambda: create_dataset("shapes", "train", length=0), "at least 1"),
        (lambda: create_dataset("ade20k", "train", length=3), "shapes"),
        (lambda: create_dataset("ade20k", "train", image_size=(64, 96)), "one number"),
        (lambda: load_config("nosuch"), "datasets"),
    ]
    for call, allowed in calls:
        with pytest.raises(ValueError, match=allowed) as error:
            call()
        assert "\n" not in str(error.value)


def test_class_info_needs_no_files():
    for name in (name for name in DATASETS if name != "folder"):
        classes, palette = class_info(name)
        assert len(classes) == len(palette) == dataset_defaults(name)["n_cls"]
        assert palette.dtype == np.uint8


def test_scenes_depend_on_seed_split_and_index():
    scene = {key: create_dataset("shapes", key[0], seed=key[1])[key[2]] for key in [
        ("train", 0, 0), ("train", 0, 1), ("train", 1, 0), ("val", 0, 0)]}  # fmt: skip
    again = create_dataset("shapes", "train")[0]
    assert np.array_equal(again.image, scene["train", 0, 0].image)
    assert np.array_equal(again.label, scene["train", 0, 0].label)
    assert len({s.image.tobytes() for s in scene.values()}) == 4


def test_scene_sizes():
    for size in (32, 128, (96, 160), (130, 70)):
        ds = create_dataset("shapes", "val", image_size=size)
        sample = ds[3]
        shape = size if isinstance(size, tuple) else (size, size)
        assert sample.image.shape == (*shape, 3) and sample.label.shape == shape
        assert sample.image.dtype == sample.label.dtype == np.uint8
        assert ds[(0, 3)]["image"].shape == (3, min(shape), min(shape))


def test_scenes_hold_every_class():
    ds = create_dataset("shapes", "val")
    share = np.bincount(np.concatenate([ds[i].label.ravel() for i in range(len(ds))]), minlength=11)
    assert len(share) == ds.n_cls == len(ds.classes) == len(ds.palette) == 11
    assert share.min() / share.sum() > 0.005
    assert len(ds) == 50 and len(create_dataset("shapes", "train")) == 2000


def test_colour_alone_does_not_give_the_class():
    """The best guess from the (coarse) colour of a pixel, even fitted to these scenes, is often wrong."""
    ds = create_dataset("shapes", "val")
    samples = [ds[i] for i in range(50)]
    colour = np.concatenate([s.image.reshape(-1, 3) for s in samples]) // 32
    key = colour.astype(int) @ (64, 8, 1)
    label = np.concatenate([s.label.ravel() for s in samples])
    table = np.zeros((512, 11), int)
    np.add.at(table, (key, label), 1)
    counts = np.bincount(11 * label + table.argmax(1)[key], minlength=121).reshape(11, 11)
    hit = np.diag(counts)
    assert (hit / (counts.sum(0) + counts.sum(1) - hit)).mean() < 0.65


def test_train_item_types(shapes):
    item = shapes[(0, 5)]
    assert item["image"].shape == (3, 64, 64) and item["image"].dtype == torch.float32
    assert item["label"].shape == (64, 64) and item["label"].dtype == torch.int64
    assert item["image"].is_contiguous() and item["label"].is_contiguous()
    assert item["image"].abs().max() <= 1


def test_train_item_depends_on_its_numbers_alone(shapes):
    assert same(shapes[(3, 5)], create_dataset("shapes", "train", image_size=64)[(3, 5)])
    assert same(shapes[[3, np.int64(5)]], shapes[(3, 5)])
    assert not same(shapes[(3, 5)], shapes[(4, 5)])
    assert not same(shapes.train_item(5, 1), shapes.train_item(5, 2))


def test_global_generators_are_left_alone(shapes):
    np.random.seed(7)
    random.seed(7)
    expected = np.random.rand(), random.random()
    np.random.seed(7)
    random.seed(7)
    shapes[(0, 0)]
    assert (np.random.rand(), random.random()) == expected


def test_index_out_of_range(shapes):
    with pytest.raises(IndexError):
        shapes[40]
    assert shapes[-1].name == shapes[39].name == "train_00039"
    assert len(list(shapes)) == 40


def test_workers_change_nothing(shapes):
    order = [(1, 4), (1, 0), (2, 4), (2, 7), (3, 1), (0, 30)]
    alone, both = (list(DataLoader(shapes, sampler=order, batch_size=2, num_workers=workers)) for workers in (0, 2))
    assert len(alone) == len(both) == 3 and all(same(a, b) for a, b in zip(alone, both, strict=True))


def test_image_smaller_than_the_crop_is_padded():
    ds = create_dataset("shapes", "train", image_size=40, crop_size=96)
    padded = 0
    for index in range(8):
        item = ds[(0, index)]
        outside = item["label"] == IGNORE_LABEL
        assert item["image"].shape == (3, 96, 96)
        assert (item["image"][:, outside] == 0).all()
        padded += bool(outside.any())
    assert padded >= 6  # 40 pixels reach 96 only if they are enlarged more than twice


def test_crops_avoid_one_class_alone(shapes):
    shares = [shapes[(e, i)]["label"] for e in range(4) for i in range(10)]
    top = [torch.bincount(s[s != IGNORE_LABEL]).max() / (s != IGNORE_LABEL).sum() for s in shares]
    assert np.mean([float(t) > 0.75 for t in top]) < 0.2


def test_normalize():
    image = np.zeros((4, 6, 3), np.uint8)
    image[..., 0] = 255
    for normalization, (mean, std) in NORMALIZATION.items():
        red = normalize(image, normalization)
        expected = [(v - m) / s for v, m, s in zip((1, 0, 0), mean, std, strict=True)]
        assert red.shape == (3, 4, 6) and red.dtype == torch.float32 and red.is_contiguous()
        assert np.allclose(red[:, 0, 0], expected, atol=1e-6)
        assert np.allclose(normalize(image[:, ::-1], normalization), red)


def test_training_normalises_like_evaluation():
    """With the distortions taken out, the pipeline gives what `normalize` gives."""
    from segm.data.openmmlab import Normalize, Pad, TrainTransform

    sample = create_dataset("shapes", "val", image_size=64)[0]
    for normalization in NORMALIZATION:
        transform = TrainTransform((256, 64), 64, normalization)
        transform.steps = tuple(step for step in transform.steps if isinstance(step, (Normalize, Pad)))
        item = transform(sample.image, sample.label)
        assert torch.allclose(item["image"], normalize(sample.image, normalization), atol=1e-5)
        assert np.array_equal(item["label"], sample.label)


def test_view_keeps_the_ratio():
    ds = create_dataset("shapes", "val")
    for shape, ratio, expected in [
        ((100, 200), 1.0, (128, 256)),
        ((200, 100), 1.0, (256, 128)),
        ((100, 200), 0.75, (96, 192)),
        ((50, 400), 1.0, (64, 512)),  # the longer side reaches 4 * 128 first
        ((1, 5000), 1.0, (1, 512)),
    ]:
        view = ds.view(np.full((*shape, 3), 200, np.uint8), ratio)
        assert view.shape == (3, *expected) and view.dtype == torch.float32
        assert torch.allclose(view, torch.tensor(200 / 127.5 - 1))


def test_view_resizes_as_mmcv_does():
    from segm.data.openmmlab import Resize

    ds = create_dataset("shapes", "val", image_size=(90, 123))
    image = ds[0].image
    resized = Resize(scale=(180, 45), keep_ratio=True)({"img": image})["img"]
    assert torch.equal(ds.view(image, 0.5), normalize(resized, "vit"))


def test_images_are_mirrored_unless_that_is_turned_off():
    def labels(flip):
        images = create_dataset("shapes", "train", image_size=32, ratios=(1.0, 1.0), flip=flip, length=12)
        return [(images[0, index]["label"].numpy(), images[index].label) for index in range(12)]

    assert all((found == own).all() for found, own in labels(False))
    mirrored = [(found == own[:, ::-1]).all() for found, own in labels(True)]
    assert any(mirrored) and not all(mirrored)
