"""Sliding windows and the views of an image."""

import os
from itertools import product
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import patch
from segm.data import Sample, create_dataset, normalize
from segm.data.images import resize_keep_ratio
from segm.eval.evaluate import MULTISCALE, Items, both_ways, evaluate, read_ahead
from segm.eval.sliding import Windows, _parts, predict_labels, upscale_to_window, window_starts
from segm.merging import build_model
from segm.model.upsample import upsample
from segm.parallel import default_workers
from tests.helpers import view_logits


def by_pixel(images):
    """A 'model' whose logits are the pixels themselves, so that windows can be checked by their result."""
    return images * 2


def test_windows_lie_at_the_stride_and_at_the_far_edge():
    for arguments, starts in {
        (10, 10, 5): [0], (11, 10, 5): [0, 1], (20, 10, 5): [0, 5, 10], (23, 10, 10): [0, 10, 13], (8, 10, 5): [0],
    }.items():  # fmt: skip
        assert window_starts(*arguments) == starts


def by_definition(model, views, windows, size):
    """Sum of the probabilities of all views (C, H, W), with the logits of whole images in memory; pixel by pixel."""
    total = 0
    for image, flipped in views:
        image = upscale_to_window(image[None], windows.size)
        (height, width), (win_h, win_w) = image.shape[-2:], windows.size
        logits, count = 0, torch.zeros(height, width)
        for top, left in product(
            window_starts(height, win_h, windows.stride[0]), window_starts(width, win_w, windows.stride[1])
        ):
            own = model(image[..., top : top + win_h, left : left + win_w])[0]
            margins = (left, width - left - win_w, top, height - top - win_h)
            logits = logits + torch.nn.functional.pad(own, margins)
            count[top : top + win_h, left : left + win_w] += 1
        logits = upsample((logits / count)[None], size)[0]
        total = total + (logits.flip(-1) if flipped else logits).softmax(0)
    return total


class Coarse(torch.nn.Module):
    """A model that counts the windows that it is given and has 150 classes, random ones, on a grid of patches."""

    patch_size = (16, 16)

    def __init__(self):
        super().__init__()
        self.n_windows = 0

    def grid_logits(self, images):
        self.n_windows += len(images)
        return torch.randn(len(images), 150, *(-(-side // 16) for side in images.shape[-2:]))


def test_every_pixel_is_covered_and_averaged():
    for size, window, batch_size in product([(16, 16), (20, 37), (33, 16)], (16, (8, 16), (16, 11)), (1, 4, 100)):
        image = torch.randn(3, *size)
        found = view_logits(by_pixel, image, False, Windows.of(window, 7, batch_size), size)
        torch.testing.assert_close(found, image * 2)


def test_a_small_image_is_scaled_up_to_the_window():
    assert upscale_to_window(torch.randn(1, 3, 10, 25), (16, 16)).shape == (1, 3, 16, 40)
    for size, expected in (((12, 16), (12, 16)), ((6, 8), (12, 16)), ((6, 10), (12, 20)), ((9, 8), (18, 16))):
        assert upscale_to_window(torch.randn(1, 3, *size), (12, 16)).shape == (1, 3, *expected)


def test_an_image_of_the_windows_size_is_one_pass():
    seen = []
    image = torch.randn(3, 12, 16)
    windows = Windows.of((12, 16), (6, 8))
    view_logits(lambda images: seen.append(images) or images, image, False, windows, (12, 16))
    assert len(seen) == 1 and torch.equal(seen[0][0], image)


@pytest.mark.parametrize("merging", [{}, {"threshold": 0.5}])
def test_labels_are_those_of_the_definition(small_net, merging, monkeypatch):
    """Logits are kept per patch, and pixels are done in parts: for windows that are whole patches or not, of images of
    any size, at several scales and mirrored."""
    monkeypatch.setattr("segm.model.upsample.BAND_BYTES", 20_000)  # of 5 classes: 1,000 pixels
    model = build_model(small_net).eval()
    if merging:
        patch.apply(model, "graph", layers=[1], **merging)
    sizes = [((32, 32), (32, 32)), ((43, 70), (90, 131)), ((20, 30), (17, 90)), ((70, 40), (200, 8))]
    for (scaled, size), windows in product(sizes, [Windows.of(32, 32, 1), Windows.of((28, 36), (20, 17))]):
        image = torch.randn(3, *scaled)
        larger = upsample(image[None], [round(1.5 * side) for side in scaled])[0]
        for views in ([(image, False)], [(image.flip(-1), True)], [*both_ways([image, larger], True, "cpu")]):
            with torch.inference_mode():
                expected = by_definition(model, views, windows, size)
                found = predict_labels(model, views, windows, size)
            assert found.shape == size
            chosen = expected.gather(0, found[None])[0]
            torch.testing.assert_close(chosen, expected.max(0).values, atol=1e-5, rtol=0)
            assert (found == expected.argmax(0)).float().mean() > 0.999


@pytest.mark.parametrize(
    ("photo", "short", "window", "stride", "ratios", "n_windows"),
    [
        ((3000, 4000), 512, 512, 512, (1.0,), 2),
        ((4000, 3000), 512, 512, 512, (1.0,), 2),
        ((2160, 3840), 512, 512, 512, (1.0,), 2),
        ((1024, 2048), 1024, 768, 512, (1.0,), 8),
        ((1024, 2048), 1024, 768, 512, MULTISCALE, 126),
    ],
)
def test_every_window_is_one_pass_of_the_network(photo, short, window, stride, ratios, n_windows, monkeypatch):
    """However many parts the original image is done in: 12 megapixels, a 4K frame, Cityscapes at several scales."""
    monkeypatch.setattr("segm.model.upsample.BAND_BYTES", 600_000)  # 1,000 pixels of 150 classes
    model, (height, width), flip = Coarse(), photo, len(ratios) > 1
    sizes = [[round(side * short * ratio / min(photo)) for side in photo] for ratio in ratios]
    views = both_ways([torch.zeros(3, *size) for size in sizes], flip, "cpu")
    size = (height // 16, width // 16)  # of the label map: 8 to 47 parts
    assert predict_labels(model, views, Windows.of(window, stride), size).shape == size
    assert model.n_windows == n_windows


def test_a_view_comes_back_at_the_original_size_and_unflipped():
    image = torch.randn(3, 16, 16)
    plain = view_logits(by_pixel, image, False, Windows.of(16, 16), (16, 16))
    mirrored = view_logits(by_pixel, image.flip(-1), True, Windows.of(16, 16), (16, 16))
    torch.testing.assert_close(plain, mirrored)
    assert view_logits(by_pixel, image, False, Windows.of(16, 16), (30, 20)).shape == (3, 30, 20)


@pytest.mark.nightly
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux tells the peak of a process")
@pytest.mark.parametrize("ratios", [(1.0,), (1.0, 1.75)])
def test_memory_of_a_large_photograph(ratios):
    """12 megapixels, 150 classes: their logits would take 7.2 GB, and as much for every scale."""
    photo = np.zeros((3000, 4000, 3), np.uint8)
    views = [normalize(resize_keep_ratio(photo, int(2048 * ratio), int(512 * ratio)), "vit") for ratio in ratios]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, windows = peak_mib(), Windows.of(512, 512)
    labels = predict_labels(Coarse(), both_ways(views, False, "cpu"), windows, photo.shape[:2])
    assert labels.shape == (3000, 4000) and peak_mib() - before < 400


def peak_mib():
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmHWM")) / 1024


@pytest.mark.parametrize("size", [(16, 90), (90, 16), (33, 50), (200, 8), (1, 1)])
@pytest.mark.parametrize("limit", [1, 500, 5000, 10**9])
def test_an_image_is_cut_into_parts_of_a_limited_size(size, limit):
    seen = torch.zeros(size, dtype=torch.long)
    for rows, columns in _parts(size, limit):
        assert 0 < seen[rows, columns].numel() <= limit
        seen[rows, columns] += 1
    assert (seen == 1).all()
    assert sum(1 for _ in _parts((4000, 3000), 10**5)) < 200  # nearly square ones


def test_probabilities_of_all_views_are_summed():
    images = [torch.randn(3, 16, 16) for _ in range(3)]
    windows = Windows.of(16, 16)
    expected = sum((2 * image).softmax(0) for image in images).argmax(0)
    assert torch.equal(predict_labels(by_pixel, [(image, False) for image in images], windows, (16, 16)), expected)


def test_multiscale_has_six_scales_and_their_mirror_images():
    dataset = create_dataset("shapes", "val", image_size=64)
    views = both_ways(Items(dataset, dataset.view, MULTISCALE)[0].views, True, "cpu")
    assert [tuple(v.shape[-2:]) for v, _ in views[:6]] == [(s, s) for s in (32, 48, 64, 80, 96, 112)]
    assert [flipped for _, flipped in views] == [False] * 6 + [True] * 6
    assert torch.equal(views[0][0].flip(-1), views[6][0])


def test_evaluation_counts_every_pixel_of_every_image_once():
    dataset, seen, windows = create_dataset("shapes", "val", image_size=32, length=5), [], Windows.of(32, 32)

    def constant(images):
        return torch.zeros(len(images), 11, *images.shape[-2:]).index_fill(1, torch.tensor([4]), 1)

    confusion = evaluate(constant, dataset, windows, on_image=lambda s, labels: seen.append((s.name, labels)))
    truth = np.bincount(np.concatenate([dataset[i].label.ravel() for i in range(5)]), minlength=11)
    assert torch.equal(confusion.sum(1), torch.from_numpy(truth)) and confusion[:, 4].sum() == 5 * 32 * 32
    assert [name for name, _ in seen] == [dataset[i].name for i in range(5)]
    assert all(labels.shape == (32, 32) and (labels == 4).all() for _, labels in seen)
    assert evaluate(constant, dataset, windows, n_images=2).sum() == 2 * 32 * 32


class Observed:
    """An evaluation split whose samples say in which process they were read, and with how many threads."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        counts = [os.getpid(), cv2.getNumThreads(), torch.get_num_threads(), index]
        return Sample(" ".join(map(str, counts)), np.zeros((4, 4, 3), np.uint8), None)


def view_of_process(image, ratio):
    return torch.full((3, 4, 4), float(os.getpid() % 2**20))


def test_workers_read_and_resize_with_one_thread_each():
    view = view_of_process  # with a name: Python 3.14 pickles what workers get
    items = list(read_ahead(Items(Observed(), view), [2, 0, 3], 2, "cpu"))
    pids, opencv, torch_threads, indices = zip(*(map(int, item.sample.name.split()) for item in items), strict=True)
    assert indices == (2, 0, 3) and os.getpid() not in pids
    assert set(opencv) == set(torch_threads) == {1}
    assert [item.views[0].unique().item() for item in items] == [pid % 2**20 for pid in pids]
    alone = list(read_ahead(Items(Observed(), view), [2, 0, 3], 0, "cpu"))
    assert {int(item.sample.name.split()[0]) for item in alone} == {os.getpid()}


def test_workers_score_like_the_program_itself():
    """And leave the generator alone that a training draws from."""
    dataset, windows = create_dataset("shapes", "val", image_size=32, length=5), Windows.of(16, 16)
    model = torch.nn.Conv2d(3, 11, 1)
    state = torch.get_rng_state()
    scores = [evaluate(model, dataset, windows, ratios=(0.5, 1.0), flip=True, workers=n) for n in (0, 2)]
    assert torch.equal(*scores) and torch.equal(torch.get_rng_state(), state)


def test_the_cores_are_shared_by_the_processes(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12), raising=False)
    monkeypatch.setattr("segm.parallel.MOST_WORKERS", 8)
    found = []
    for processes in (None, "2", "5", "24"):
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
        if processes:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        found.append(default_workers())
    assert found == [8, 6, 2, 0]


def test_impossible_windows_are_refused():
    for arguments in ((0, 1), (16, 0), (16, 17), (16, 16, 0)):
        with pytest.raises(ValueError, match="window"):
            Windows.of(*arguments)
