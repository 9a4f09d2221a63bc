"""Boundary IoU against its definition, pixel by pixel."""

import numpy as np
import pytest
from scipy.ndimage import distance_transform_cdt

from segm.eval import miou
from segm.metrics import BoundaryCount, inner_boundary


def by_distance(mask, width):
    """Pixels of a mask whose distance to its outside, in steps to one of eight neighbors, is at most `width`."""
    return mask & (distance_transform_cdt(np.pad(mask, 1), metric="chessboard")[1:-1, 1:-1] <= width)


def test_the_boundary_is_a_band_inside_the_mask():
    rng = np.random.default_rng(0)
    for width in (1, 2, 5):
        coarse = rng.random((5, 7)) < 0.6
        mask = np.kron(coarse, np.ones((9, 8))).astype(bool)
        assert np.array_equal(inner_boundary(mask, width), by_distance(mask, width))
    assert not inner_boundary(np.zeros((8, 8), bool), 2).any()


def test_the_iou_is_over_all_images_and_over_known_pixels():
    rng, count, expected = np.random.default_rng(1), BoundaryCount(4), np.zeros((2, 3))
    for height, width in ((60, 80), (33, 120)):
        label = np.kron(rng.integers(0, 3, (4, 4)), np.ones((height // 4 + 1, width // 4 + 1), int))[:height, :width]
        prediction = np.roll(label, 3, axis=1)
        label = label.astype(np.uint8)
        label[:10] = 255
        count.add(prediction, label)
        band, known = max(1, round(0.02 * np.hypot(height, width))), label != 255
        for index in range(3):
            true, found = (by_distance(x == index, band) & known for x in (label, prediction))
            expected[:, index] += (true & found).sum(), (true | found).sum()
    iou = 100 * expected[0] / expected[1]
    scores = count.scores()
    assert scores["per_class_boundary_iou"][:3] == pytest.approx(iou.round(2)) and 0 < iou.min() < iou.max() < 100
    assert scores["per_class_boundary_iou"][3] is None
    assert scores["boundary_iou"] == pytest.approx(iou.mean(), abs=0.01)


def test_a_perfect_prediction_scores_100():
    label = np.kron(np.arange(4).reshape(2, 2), np.ones((20, 20), int))
    count = BoundaryCount(4)
    count.add(label, label)
    assert count.scores()["boundary_iou"] == 100


def test_the_command_prints_and_writes_it(shapes_run, call):
    text = call(miou, shapes_run, "shapes", "--boundary", "--max-images", 2, "--device", "cpu")
    assert "boundary_iou: " in text and "boundary_iou" in (shapes_run / "scores_ss.yml").read_text()
    assert "boundary_iou" not in call(miou, shapes_run, "shapes", "--max-images", 2, "--device", "cpu")
