"""Label maps without the upsampled scores or masks."""

from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from segm.model import upsample as module
from segm.model.masks import Prediction, best_classes, class_scores
from segm.model.upsample import label_map, upsample
from tests.helpers import by_speed


def scores_of(kind, n_images, n_cls, grid):
    """Scores as of a trained model ("smooth"), of an untrained one ("noise"), or of one that has merged rows."""
    scores = torch.randn(n_images, n_cls, *grid, dtype=torch.float64)
    if kind == "merged":
        return scores[:, :, torch.arange(grid[0]) // 2]
    return F.avg_pool2d(F.pad(scores, (2, 2, 2, 2), mode="replicate"), 5, 1) if kind == "smooth" else scores


@pytest.mark.parametrize("kind", ["smooth", "noise", "merged"])
def test_every_form_is_the_argmax_of_the_upsampled_scores(kind):
    """`label_map` takes one form on a CPU and the other on a GPU."""
    shapes = [(150, (6, 9)), (9, (5, 4)), (10, (3, 3)), (2, (4, 4)), (30, (1, 1)), (30, (1, 5))]
    for patch_size, (n_cls, grid) in product([(16, 16), (7, 4), (1, 1), (2, 3)], shapes):
        scores = scores_of(kind, 2, n_cls, grid)
        expected = upsample(scores, (grid[0] * patch_size[0], grid[1] * patch_size[1])).argmax(1)
        for form in (module._label_map_by_cells, module._label_map_in_bands):
            assert torch.equal(form(scores, patch_size), expected)


def test_small_parts_give_the_same(monkeypatch):
    scores = scores_of("smooth", 5, 40, (8, 8))
    expected = label_map(scores, (8, 8))
    for limit in (1, 30_000, 10**6):  # the last one: several images at once
        monkeypatch.setattr(module, "BAND_BYTES", limit)
        assert torch.equal(label_map(scores, (8, 8)), expected)
        assert torch.equal(module._label_map_in_bands(scores, (8, 8)), expected)


def test_on_a_gpu_a_batch_is_few_calls(monkeypatch):
    """Images of 512x512 pixels, 150 classes; the meta device stands in for a GPU."""
    calls = []
    monkeypatch.setattr(module, "upsample", lambda x, size: (calls.append(len(x)), upsample(x, size))[1])
    for n_images, n_calls in ((1, 1), (6, 1), (32, 6), (0, 1)):
        calls.clear()
        labels = label_map(torch.empty(n_images, 150, 32, 32, device="meta"), (16, 16))
        assert labels.shape == (n_images, 512, 512) and len(calls) == n_calls and sum(calls) == n_images
    label_map(torch.empty(1, 150, 250, 188, device="meta"), (16, 16))  # 12 megapixels: parts of 1 GiB
    assert len(calls) == 1 + 7


def test_of_equal_scores_the_first_class_wins():
    scores = torch.zeros(1, 40, 3, 3)
    scores[:, [7, 3]] = torch.randn(3, 3)  # two classes with the same scores
    expected = upsample(scores, (12, 12)).argmax(1)
    assert torch.equal(label_map(scores, (4, 4)), expected) and set(expected.unique().tolist()) <= {0, 3}


def test_half_precision_scores_are_compared_in_single():
    for dtype in (torch.bfloat16, torch.float16):
        scores = torch.randn(1, 20, 4, 4).to(dtype)
        assert torch.equal(label_map(scores, (8, 8)), label_map(scores.float(), (8, 8)))


@pytest.mark.parametrize("band_bytes", [1, 30_000, module.BAND_BYTES])
def test_masks_are_weighed_in_bands(band_bytes, monkeypatch):
    """Of sizes that are a multiple of the masks' or not, for several images; in half precision, in float32."""
    monkeypatch.setattr(module, "BAND_BYTES", band_bytes)
    for size in ((24, 36), (25, 31), (6, 9), (3, 4)):
        found = Prediction(torch.randn(2, 20, 8), 4 * torch.randn(2, 20, 6, 9))
        assert torch.equal(best_classes(found, size), class_scores(found, size).argmax(1))
    rounded = Prediction(*(x.bfloat16() for x in found))
    assert torch.equal(best_classes(rounded, size), best_classes(Prediction(*(x.float() for x in rounded)), size))
    assert found.masks.min() < 0  # they are as they were


@pytest.mark.parametrize("kind", by_speed(["smooth", "noise", "masks"], slow=["noise"]))
def test_memory_of_a_large_image_stays_flat(kind):
    """2048x1024 pixels, 150 classes: the upsampled scores alone would take 1.2 GB, as many masks 840 MB."""
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        pytest.skip("needs Linux's /proc")

    def peak():
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))

    if kind == "masks":
        found = Prediction(torch.randn(1, 100, 151), torch.randn(1, 100, 256, 512))
    else:
        scores = scores_of(kind, 1, 150, (64, 128)).float()
    clear.write_text("5")  # the peak starts anew
    before = peak()
    labels = best_classes(found, (1024, 2048)) if kind == "masks" else label_map(scores, (16, 16))
    assert labels.shape == (1, 1024, 2048) and peak() - before < 300 * 1024  # KiB
