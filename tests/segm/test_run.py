"""A run in the hand: what it knows, what it predicts, and which files it refuses."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from segm import test
from segm.data import class_info, create_dataset, spread
from segm.data.images import read_image, resize_keep_ratio
from segm.run import Run
from tests.helpers import read_variant, write_variant

GRAPH = {"patch_type": "graph", "threshold": 0.5}


@pytest.fixture
def photo():
    return np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)


def rewrite(folder, section, **entries):
    """Change entries of a variant; None removes one."""
    variant = read_variant(folder)
    for key, value in entries.items():
        variant[section][key] = value
        if value is None:
            del variant[section][key]
    write_variant(variant, folder)


def test_a_run_knows_what_it_was_trained_with(shapes_run):
    run = Run.load(shapes_run, device="cpu")
    assert (run.name, run.path, run.folder) == ("run", shapes_run, shapes_run)
    assert (run.method, run.options, run.dataset, run.n_cls) == ("pure", {}, "shapes", 11)
    assert (run.normalization, run.image_size, run.crop_size) == ("vit", 32, (32, 32))
    assert (run.windows.size, run.windows.stride) == ((32, 32), (32, 32))
    names, palette = class_info("shapes")
    assert run.classes == names and run.palette.dtype == np.uint8 and (run.palette == palette).all()
    assert not run.model.training
    assert Run.load(shapes_run / "checkpoint.pth", name="a", device="cpu").name == "a"


def test_merging_is_that_of_the_training_unless_something_else_is_given(shapes_run):
    rewrite(shapes_run, "dataset_kwargs", patch_type="graph", selected_layer=3, threshold=0.7)
    saved, given = Run.load(shapes_run, device="cpu"), Run.load(shapes_run, device="cpu", threshold=0.9)
    for run, threshold in ((saved, 0.7), (given, 0.9)):
        assert run.method == "graph" and run.options["layers"] == (3,) and run.options["threshold"] == threshold
    assert Run.load(shapes_run, device="cpu", patch_type="tome", r=2).options["r"] == 2
    assert Run.load(shapes_run, device="cpu", merging={"threshold": 0.8}).merging["threshold"] == 0.8
    for pure in (Run.load(shapes_run, device="cpu", patch_type="pure"), saved.unpatched("plain")):
        assert pure.method == "pure" and pure.same_network(saved)
    assert saved.method == "graph"  # its copy is another model
    with pytest.raises(ValueError, match="-1 to 1"):
        Run.load(shapes_run, device="cpu", threshold=2)


def test_a_photograph_goes_to_labels_of_its_size(shapes_run, tmp_path, photo):
    run = Run.load(shapes_run, device="cpu", **GRAPH)
    labels = run.predict(photo)
    assert labels.shape == (40, 70) and labels.dtype == np.int64 and 0 <= labels.min() <= labels.max() < 11
    file = tmp_path / "photo.png"
    cv2.imwrite(str(file), photo[..., ::-1])
    several = run.predict([file, str(file), photo])
    assert isinstance(several, list) and all((one == labels).all() for one in several)
    assert run.predict([]) == []
    assert run.preprocess(photo).shape == (1, 3, 32, 56) and run.preprocess_resized(photo).shape == (1, 3, 32, 32)
    for wrong in (photo[..., 0], photo.astype(np.float32), None):
        with pytest.raises(ValueError, match="uint8"):
            run.predict(wrong)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run.predict("nowhere.jpg")


def test_smaller_images_are_scored_at_the_size_of_their_labels(shapes_run, photo, call, refused):
    run, small = Run.load(shapes_run, device="cpu"), Run.load(shapes_run, device="cpu", im_size=16)
    assert (small.crop_size, small.windows.size, small.windows.stride) == ((16, 16),) * 3
    assert small.preprocess(photo).shape == (1, 3, 16, 28) and small.predict(photo).shape == photo.shape[:2]
    assert small.views()[0].shape == (1, 3, 16, 16) and not small.same_network(run)
    seen = []
    scores = small.evaluate(n_images=2, on_image=lambda sample, labels: seen.append((sample.image.shape, labels.shape)))
    assert seen == [((32, 32, 3), (32, 32))] * 2
    assert Run.load(shapes_run, device="cpu", im_size=32).evaluate(n_images=2) == run.evaluate(n_images=2)
    assert f"mean_iou: {scores['mean_iou']:.2f}" in call(
        test, shapes_run, "--im-size", "16", "--max-images", "2", "--device", "cpu"
    )
    assert "--im-size" in refused(test, shapes_run, "--im-size", "0")


def test_the_defaults_of_the_data_set_are_read_once(shapes_run, photo, monkeypatch):
    run = Run.load(shapes_run, device="cpu")
    first = run.predict(photo)
    monkeypatch.setattr("segm.data.factory.load_config", None)  # would fail
    np.testing.assert_array_equal(run.predict(photo), first)


def test_predictions_are_those_that_are_scored(shapes_run):
    run, seen = Run.load(shapes_run, device="cpu", **GRAPH), []
    dataset, _ = run.open()
    scores = run.evaluate(n_images=3, on_image=lambda sample, labels: seen.append((sample.image, labels.numpy())))
    assert len(seen) == 3 and all((run.predict(image) == labels).all() for image, labels in seen)
    hits = sum((labels == dataset[spread(3, len(dataset))[i]].label).sum() for i, (_, labels) in enumerate(seen))
    assert scores["pixel_accuracy"] == pytest.approx(100 * hits / sum(labels.size for _, labels in seen), abs=0.01)
    assert len(scores["per_class_iou"]) == 11


def test_a_run_predicts_in_the_precision_of_its_training(shapes_run):
    variant = read_variant(shapes_run)
    write_variant(variant | {"amp": True}, shapes_run)
    assert Run.load(shapes_run, device="cpu").precision.dtype == torch.bfloat16
    assert Run.load(shapes_run, device="cpu", amp=False).precision.dtype is None
    write_variant(variant, shapes_run)
    assert Run.load(shapes_run, device="cpu").precision.dtype is None
    assert Run.load(shapes_run, device="cpu", amp=True).precision.dtype == torch.bfloat16


@pytest.mark.slow
def test_a_photograph_needs_no_mmsegmentation(shapes_run, tmp_path, photo):
    cv2.imwrite(str(tmp_path / "photo.jpg"), photo)
    rewrite(shapes_run, "dataset_kwargs", dataset="ade20k", classes=[{"name": "a", "color": [1, 2, 3]}] * 11)
    code = f"""
import sys
from segm.run import Run
run = Run.load({str(shapes_run)!r}, device="cpu", patch_type="graph")
assert run.predict({str(tmp_path / "photo.jpg")!r}).shape == (40, 70) and run.classes[0] == "a"
assert not {{"mmseg", "mmcv", "mmengine"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=True)


def test_reading_and_resizing_are_those_of_mmcv(tmp_path, photo):
    from mmcv import imrescale
    from mmcv.transforms import LoadImageFromFile

    import segm.data.openmmlab  # noqa: F401 - first: it keeps the import silent

    for suffix in ("png", "jpg"):
        file = tmp_path / f"photo.{suffix}"
        for picture in (photo, photo[..., 0]):
            cv2.imwrite(str(file), picture)
            expected = LoadImageFromFile()({"img_path": str(file)})["img"]
            assert (read_image(file) == expected[..., ::-1]).all()
    rng = np.random.default_rng(0)
    for _ in range(50):
        height, width, long, short = rng.integers(9, 90, 4).tolist()
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = imrescale(image, (long, short), interpolation="bilinear", backend="cv2")
        assert np.array_equal(resize_keep_ratio(image, long, short), expected)


def test_classes_of_the_data_set_have_to_be_those_of_the_run(shapes_run):
    names, palette = class_info("shapes")
    recorded = [{"name": name, "color": color} for name, color in zip(names, palette.tolist(), strict=True)]
    rewrite(shapes_run, "dataset_kwargs", classes=recorded)
    assert Run.load(shapes_run, device="cpu").open()[0].classes == names
    recorded[0]["name"] = "heaven"
    rewrite(shapes_run, "dataset_kwargs", classes=recorded)
    run = Run.load(shapes_run, device="cpu")
    with pytest.raises(ValueError, match=f"{', '.join(names)}.*heaven, {', '.join(names[1:])}"):
        run.open()
    assert len(run.views(n_images=2)) == 2  # nothing is scored


def test_a_folder_of_photographs_is_fed_like_a_data_set(shapes_run, tmp_path, photo):
    run = Run.load(shapes_run, device="cpu")
    for name in ("b.png", "deep/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), photo[..., ::-1])
    (tmp_path / "notes.txt").write_text("")
    views = run.views(tmp_path / "", batch_size=2)
    assert len(views) >= 1 and torch.equal(views[0][0], run.preprocess_resized(photo)[0])
    with pytest.raises(FileNotFoundError, match="no photograph"):
        run.views(tmp_path / "nowhere")
    sample = create_dataset("shapes", "val", image_size=32)[1].image
    assert torch.equal(run.views()[1], run.preprocess_resized(sample))


def test_numbers_that_are_missing_or_texts_are_named_with_their_file(shapes_run):
    kept = (shapes_run / "variant.yml").read_text()
    wrong = [
        *(
            ("net_kwargs", key, "16")
            for key in ("n_cls", "patch_size", "d_model", "n_heads", "n_layers", "drop_path_rate")
        ),
        *(("net_kwargs", key, None) for key in ("n_cls", "backbone", "decoder")),
        *(
            ("dataset_kwargs", key, value)
            for key, value in (("crop_size", None), ("crop_size", 7.5), ("dataset", None))
        ),
        *(
            ("inference_kwargs", key, value)
            for key in ("im_size", "window_size", "window_stride")
            for value in ("a", 0)
        ),
    ]
    for section, key, value in wrong:
        rewrite(shapes_run, section, **{key: value})
        with pytest.raises(ValueError, match=rf"variant\.yml.*{key}") as error:
            run = Run.load(shapes_run, device="cpu")
            _ = run.crop_size, run.dataset
        assert "\n" not in str(error.value)
        (shapes_run / "variant.yml").write_text(kept)
    rewrite(shapes_run, "inference_kwargs", im_size=None)
    assert Run.load(shapes_run, device="cpu").image_size == 32
    rewrite(shapes_run, "dataset_kwargs", image_size=None)
    with pytest.raises(ValueError, match=r"variant\.yml.*image_size"):
        _ = Run.load(shapes_run, device="cpu").image_size
