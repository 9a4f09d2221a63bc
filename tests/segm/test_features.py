"""Training a decoder on features that are computed once."""

import json

import numpy as np
import pytest
import torch

from segm import train
from segm.checkpoint import load_checkpoint
from segm.data import create_dataset
from segm.features import CachedFeatures, Head
from segm.interruption import Interruption, SignalError
from segm.model.factory import create_segmenter

CPU = torch.device("cpu")
FROZEN = ("--freeze-encoder", "--batch-size", 4, "--num-workers", 0, "--device", "cpu", "--eval-freq", 9)

pytestmark = pytest.mark.usefixtures("few_shapes")


@pytest.fixture
def model(small_net):
    return create_segmenter(small_net | {"n_cls": 11, "image_size": [24, 40]})


@pytest.fixture
def images():
    return create_dataset("shapes", "train", image_size=40, crop_size=(24, 40), length=5)


def float32():
    return torch.autocast("cpu", enabled=False)


def filled(images, model, folder, n_versions=2):
    cached = CachedFeatures(images, folder, n_versions)
    cached.fill(model, CPU, float32)
    return cached


def test_features_are_those_of_the_augmented_images(images, model, tmp_path):
    cached, head = filled(images, model, tmp_path), Head(model, images.crop_size)
    assert len(cached) == 5 and cached.name_of(3) == images.name_of(3)
    for epoch, version in ((0, 0), (1, 1), (4, 0)):
        item, expected = cached[epoch, 2], images[version, 2]
        assert item["image"].dtype == torch.float32 and torch.equal(item["label"], expected["label"])
        with torch.no_grad():
            logits, found = model.eval()(expected["image"][None]), head.eval()(item["image"][None])
        assert found.shape == logits.shape == (1, 11, 24, 40)
        torch.testing.assert_close(found, logits, atol=5e-3, rtol=5e-3)  # kept in half precision
    assert not torch.equal(cached[0, 2]["image"], cached[1, 2]["image"])


def test_what_is_there_is_not_computed_again_unless_it_is_of_another_model(images, model, tmp_path, monkeypatch):
    before = filled(images, model, tmp_path)[1, 4]["image"]
    calls, encode = [], type(model).encode
    monkeypatch.setattr(type(model), "encode", lambda self, x: calls.append(1) or encode(self, x))
    assert torch.equal(filled(images, model, tmp_path)[1, 4]["image"], before) and not calls
    with torch.no_grad():
        model.encoder.pos_embed.mul_(2)
    after = filled(images, model, tmp_path)
    assert calls and not torch.equal(after[1, 4]["image"], before)
    after.remove()
    assert not tmp_path.exists()


def test_a_signal_ends_the_computation_and_whole_versions_stay(images, model, tmp_path):
    interruption = Interruption()
    interruption.request()
    with pytest.raises(SignalError, match="start it again"):
        CachedFeatures(images, tmp_path, 2).fill(model, CPU, float32, interruption)
    assert not [*tmp_path.rglob("*.npy")] and [*tmp_path.rglob("*.part")]
    assert filled(images, model, tmp_path)[0, 0]["image"].isfinite().all()


def test_too_little_space_is_said_before(images, model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="--cache-features 2: takes"):
        filled(images, model, tmp_path)


def test_a_decoder_learns_from_cached_features(shapes_run, tmp_path, call):
    found = {}
    for name, more in (("cached", ("--cache-features", 2)), ("plain", ())):
        call(train, "--log-dir", tmp_path / name, "--finetune", shapes_run, "--epochs", 2, *FROZEN, *more)
        found[name] = [json.loads(line) for line in (tmp_path / name / "log.txt").read_text().splitlines()]
    assert not (tmp_path / "cached" / "features").exists()
    for cached, plain in zip(found["cached"], found["plain"], strict=True):  # all but for the rounding of the features
        assert cached["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-2)
    before, after = (load_checkpoint(folder)["model"] for folder in (shapes_run, tmp_path / "cached"))
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}
    assert np.isfinite(found["cached"][-1]["val_mean_iou"])


def test_trainings_share_a_folder_of_features(shapes_run, tmp_path, call, monkeypatch):
    calls, fill = [], CachedFeatures._fill_version
    monkeypatch.setattr(CachedFeatures, "_fill_version", lambda self, *rest: calls.append(1) or fill(self, *rest))
    kept = ("--cache-features", 1, "--feature-folder", tmp_path / "kept", "--epochs", 1)
    for seed in (0, 1):
        call(train, "--log-dir", tmp_path / str(seed), "--finetune", shapes_run, *FROZEN, *kept, "--seed", seed)
    assert len(calls) == 1 and [*(tmp_path / "kept").rglob("*.npy")]
    first, second = (load_checkpoint(tmp_path / name)["model"]["decoder.cls_emb"] for name in ("0", "1"))
    assert not torch.equal(first, second)


def test_features_are_kept_of_nothing_that_changes(shapes_run, tmp_path, refused):
    common = ("--log-dir", tmp_path / "new", "--finetune", shapes_run, "--cache-features", 1)
    for options in ((), ("--freeze-encoder", "--drop-path", 0.1), ("--freeze-encoder", "--dropout", 0.1)):
        assert "--freeze-encoder, without dropout" in refused(train, *common, *options)
    merged = ("--freeze-encoder", "--patch-type", "graph", "--selected-layer", 1, "--threshold", 0.9)
    assert "merging with graph is not kept" in refused(train, *common, *merged)
    assert "--skip-bad-images" in refused(train, *common, "--freeze-encoder", "--skip-bad-images")
