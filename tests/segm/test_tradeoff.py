"""The settings that no others beat."""

import numpy as np
import pytest

from segm.run import Run
from segm.tradeoff import Setting, best_at, hull


def rows_of(points):
    """(seconds per image, mIoU) -> rows."""
    return [{"images_per_second": 1 / seconds, "mean_iou": score} for seconds, score in points]


def test_the_hull_is_what_no_mixture_of_others_beats():
    assert hull([]) == [] and hull(rows_of([(1, 50)])) == [0]
    assert hull(rows_of([(1, 50), (2, 60), (3, 61), (4, 60)])) == [0, 1, 2]
    assert hull(rows_of([(1, 50), (2, 52), (3, 61)])) == [0, 2]  # half of the first and half of the last beat it
    assert hull(rows_of([(1, 50), (1, 55), (2, 55)])) == [1]


def test_the_hull_against_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [(float(x), float(y)) for x, y in zip(rng.uniform(1, 5, 12), rng.uniform(40, 60, 12), strict=True)]
        found = hull(rows_of(points))
        times, scores = zip(*(points[i] for i in found), strict=True)
        assert list(times) == sorted(times) and list(scores) == sorted(scores)
        for seconds, score in points:
            assert score <= np.interp(seconds, times, scores) + 1e-9 and seconds >= times[0]
        for i in found[1:-1]:  # none of them lies on the line between two others
            others = [j for j in found if j != i]
            between = np.interp(points[i][0], *zip(*(points[j] for j in others), strict=True))
            assert points[i][1] > between


def test_the_best_of_the_fast_ones():
    rows = rows_of([(0.1, 50), (0.2, 60), (0.15, 60), (1, 70)])
    assert best_at(rows, 5) is rows[2] and best_at(rows, 8) is rows[0] and best_at(rows, 0.5) is rows[3]
    assert best_at(rows, 11) is None


def test_variations_share_their_weights_and_nothing_else(shapes_run):
    run = Run.load(shapes_run, device="cpu", patch_type="graph", layers=[1], threshold=0.5)
    pure, other = run.variation("pure", {}), Setting("tome", {"r": 2}, 16).apply_to(run)
    assert (run.method, pure.method, other.method) == ("graph", "pure", "tome")
    assert other.image_size == run.image_size and other.crop_size == (16, 16) and run.crop_size == (32, 32)
    for one in (pure, other):
        pairs = zip(run.model.parameters(), one.model.parameters(), strict=True)
        assert all(a is b for a, b in pairs)
    assert Setting("tome", {"r": 2}).key == Setting("tome", {"r": 2}).key != Setting("tome", {"r": 3}).key
    with pytest.raises(ValueError, match="choose"):
        run.variation("nothing", {})
