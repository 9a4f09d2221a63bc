"""The settings that no others beat."""

import pytest

from segm.run import Run
from segm.tradeoff import Setting, best_at


def rows_of(points):
    """(seconds per image, mIoU) -> rows."""
    return [{"images_per_second": 1 / seconds, "mean_iou": score} for seconds, score in points]


def test_the_best_of_the_fast_ones():
    rows = rows_of([(0.1, 50), (0.2, 60), (0.15, 60), (1, 70)])
    assert best_at(rows, 5) is rows[2] and best_at(rows, 8) is rows[0] and best_at(rows, 0.5) is rows[3]
    assert best_at(rows, 11) is None


def test_variations_share_their_weights_and_nothing_else(shapes_run):
    run = Run.load(shapes_run, device="cpu", patch_type="graph", layers=[1], threshold=0.5)
    pure, other = run.with_settings("pure", {}), Setting("tome", {"r": 2}, 16).apply_to(run)
    assert (run.method, pure.method, other.method) == ("graph", "pure", "tome")
    assert other.image_size == run.image_size and other.crop_size == (16, 16) and run.crop_size == (32, 32)
    for one in (pure, other):
        pairs = zip(run.model.parameters(), one.model.parameters(), strict=True)
        assert all(a is b for a, b in pairs)
    assert Setting("tome", {"r": 2}).key == Setting("tome", {"r": 2}).key != Setting("tome", {"r": 3}).key
    with pytest.raises(ValueError, match="choose"):
        run.with_settings("nothing", {})
