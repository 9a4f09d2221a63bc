"""Training a decoder on features that are computed once."""

import json
from contextlib import nullcontext

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist

from segm import features, train
from segm.checkpoint import load_checkpoint
from segm.data import create_dataset
from segm.features import CachedFeatures, DecoderOnly
from segm.model.factory import create_segmenter
from segm.parallel import Interruption, SignalError

CPU = torch.device("cpu")
FROZEN = ("--freeze-encoder", "--batch-size", 20, "--num-workers", 0, "--device", "cpu", "--eval-freq", 9)


@pytest.fixture
def model(small_net):
    return create_segmenter(small_net | {"n_cls": 11, "image_size": [24, 40]})


@pytest.fixture
def images():
    return create_dataset("shapes", "train", image_size=40, crop_size=(24, 40), length=5)


def float32():
    return torch.autocast("cpu", enabled=False)


def bfloat16():
    return torch.autocast("cpu", torch.bfloat16)


def filled(images, model, folder, n_versions=2, autocast=float32):
    cached = CachedFeatures(images, folder, n_versions)
    cached.fill(model, CPU, autocast)
    return cached


def equal(first, second):
    return all(torch.equal(first[key], second[key]) for key in ("image", "label"))


def own_data(folder, seed=0):
    """A data set of the user's own: noise, so that pictures differ."""
    rng = np.random.default_rng(seed)
    for kind, top, suffix in (("images", 256, "bmp"), ("annotations", 3, "png")):
        (folder / kind / "train").mkdir(parents=True, exist_ok=True)
        for index in range(3):
            picture = rng.integers(0, top, (24, 40), dtype=np.uint8)
            cv2.imwrite(str(folder / f"{kind}/train/{index}.{suffix}"), picture)
    (folder / "classes.yml").write_text("[a, b, c]")
    return create_dataset("folder", "train", root=folder, image_size=24, crop_size=(24, 40))


def test_features_are_those_of_the_augmented_images(images, model, tmp_path):
    cached, head = filled(images, model, tmp_path), DecoderOnly(model, images.crop_size)
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


def test_data_sets_of_one_length_share_no_features(model, tmp_path):
    """Neither does one data set before and after a change."""
    folder, first, second = tmp_path / "features", own_data(tmp_path / "a"), own_data(tmp_path / "b", seed=1)
    before = filled(first, model, folder)
    assert not equal(filled(second, model, folder)[0, 0], before[0, 0])
    assert torch.equal(filled(second, model, folder)[0, 0]["label"], second[0, 0]["label"])
    again = filled(first, model, folder)
    assert again.folder == before.folder and equal(again[0, 0], before[0, 0])
    picture = cv2.imread(str(tmp_path / "a/images/train/1.bmp"))
    cv2.imwrite(str(tmp_path / "a/images/train/1.bmp"), picture[::-1])  # a file of the same name and size
    changed = filled(first, model, folder)
    assert equal(changed[0, 0], before[0, 0]) and not torch.equal(changed[0, 1]["image"], before[0, 1]["image"])


def test_precisions_share_no_features(images, model, tmp_path):
    mixed, whole = (filled(images, model, tmp_path / "one", autocast=one)[0, 0]["image"] for one in (bfloat16, float32))
    assert torch.equal(whole, filled(images, model, tmp_path / "two", autocast=nullcontext)[0, 0]["image"])
    assert not torch.equal(mixed, whole)


def test_encoders_of_equal_weights_share_no_features(images, small_net, tmp_path):
    nets = [small_net | {"n_cls": 11, "image_size": [24, 40], "n_heads": n_heads} for n_heads in (2, 4)]
    first, second = map(create_segmenter, nets)
    second.load_state_dict(first.state_dict())
    assert not equal(filled(images, first, tmp_path)[0, 0], filled(images, second, tmp_path)[0, 0])


def test_a_signal_ends_the_computation_and_whole_parts_stay(images, model, tmp_path, monkeypatch):
    monkeypatch.setattr(features, "PART", 2)
    interruption, calls = Interruption(), []

    def autocast():
        calls.append(1)
        if len(calls) == 3:  # of the precision, of the first part, of the second
            interruption.request()
        return nullcontext()

    with pytest.raises(SignalError, match="start it again"):
        CachedFeatures(images, tmp_path, 2).fill(model, CPU, autocast, interruption)
    assert [file.name for file in tmp_path.rglob("*.*")] == ["0_0.safetensors"]
    (first,) = tmp_path.rglob("0_0.safetensors")
    before = first.stat().st_mtime_ns
    cached = filled(images, model, tmp_path)
    assert first.stat().st_mtime_ns == before and len([*tmp_path.rglob("*.*")]) == 2 * 3
    for version, index in ((0, 0), (0, 4), (1, 3)):
        assert torch.equal(cached[version, index]["label"], images[version, index]["label"])


def test_trainings_that_fill_one_folder_at_once_read_whole_features(images, model, tmp_path, monkeypatch):
    """The second one begins while the first computes, and is done before it."""
    expected = filled(images, model, tmp_path / "alone")
    encode, second = type(model).encode, []

    def interrupted(self, x):
        if not second:
            second.append(CachedFeatures(images, tmp_path / "both", 2))
            second[0].fill(model, CPU, float32)
        return encode(self, x)

    monkeypatch.setattr(type(model), "encode", interrupted)
    first = filled(images, model, tmp_path / "both")
    for cached in (first, *second):
        assert all(equal(cached[item], expected[item]) for item in ((0, 0), (0, 4), (1, 2)))
    assert first.folder == second[0].folder and not [*tmp_path.rglob("*.part")]


def fill_as_one_of_two(rank, images, model, folder):
    """In a process of its own: fill one version, and note what it did."""
    torch.set_num_threads(1)
    events = []

    def noted(owner, name):
        function = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: (events.append(name), function(*args, **kwargs))[1])

    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for owner, names in (
        (dist, ("all_reduce", "all_gather", "barrier", "broadcast_object_list")),
        (type(model), ("encode",)),
    ):
        for name in names:
            noted(owner, name)
    features.PART = 2
    cached = filled(images, model, folder / "features", n_versions=1)
    labels = [cached[0, index]["label"] for index in range(5)]
    torch.save({"events": events, "labels": labels}, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_share_one_version_and_do_not_wait_in_a_collective(images, model, tmp_path):
    """A collective times out where the other process computes for longer than half an hour."""
    torch.multiprocessing.start_processes(fill_as_one_of_two, (images, model, tmp_path), nprocs=2, start_method="fork")
    for rank, n_parts in ((0, 2), (1, 1)):  # of three parts
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["events"] == ["broadcast_object_list", *["encode"] * n_parts]
        assert all(torch.equal(found["labels"][index], images[0, index]["label"]) for index in range(5))


def test_too_little_space_is_said_before(images, model, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match="--cache-features 2: takes"):
        filled(images, model, tmp_path)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 100, "val": 4})


@pytest.mark.usefixtures("few")
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


@pytest.mark.usefixtures("few")
def test_trainings_share_a_folder_of_features(shapes_run, tmp_path, call):
    kept = ("--cache-features", 1, "--feature-folder", tmp_path / "kept", "--epochs", 1)
    times = []
    for seed in (0, 1):
        call(train, "--log-dir", tmp_path / str(seed), "--finetune", shapes_run, *FROZEN, *kept, "--seed", seed)
        times.append({file: file.stat().st_mtime_ns for file in (tmp_path / "kept").rglob("*.*")})
    assert times[0] == times[1] and len({file.parent for file in times[0]}) == 1
    first, second = (load_checkpoint(tmp_path / name)["model"]["decoder.cls_emb"] for name in ("0", "1"))
    assert not torch.equal(first, second)


def test_features_are_kept_of_nothing_that_changes(shapes_run, tmp_path, refused):
    common = ("--log-dir", tmp_path / "new", "--finetune", shapes_run, "--cache-features", 1)
    for options in ((), ("--freeze-encoder", "--drop-path", 0.1), ("--freeze-encoder", "--dropout", 0.1)):
        assert "--freeze-encoder, without dropout" in refused(train, *common, *options)
    merged = ("--freeze-encoder", "--patch-type", "graph", "--selected-layer", 1, "--threshold", 0.9)
    assert "merging with graph is not kept" in refused(train, *common, *merged)
    assert "--skip-bad-images" in refused(train, *common, "--freeze-encoder", "--skip-bad-images")
