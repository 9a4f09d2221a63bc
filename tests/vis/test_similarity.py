"""Pictures of similarities."""

import matplotlib
import numpy as np

from vis import class_similarity_curves, similarity_map, threshold_curves


def shares(picture, *colors):
    """Share of the pixels of a picture that have each color, (r, g, b)."""
    return [(picture == color).all(-1).mean() for color in colors]


def viridis(value):
    return np.array(matplotlib.colormaps["viridis"](value, bytes=True)[:3])


def test_windows_have_the_colors_of_their_similarities():
    """From the lowest to 1; a window twice as wide as high takes twice the room."""
    low, high = shares(similarity_map(np.array([[0.2, 1.0, 0.2]]), (2, 2)), *map(viridis, (0.0, 1.0)))
    assert high > 0.1 and 1.9 < low / high < 2.1
    square, wide = (similarity_map(np.array([[0.2], [1.0]]), window) for window in ((2, 2), (1, 2)))
    assert abs(square.shape[0] - 2 * wide.shape[0]) < 60


def test_kinds_of_pairs_that_do_not_occur_are_left_out():
    rows = [{"layer": layer, "window": side, "same": 0.9, "different": 0.4} for layer in (1, 2) for side in (2, 0)]
    both = class_similarity_curves(rows)
    alone = class_similarity_curves([row | {"different": None} for row in rows])
    assert both.shape == alone.shape and (both < 200).any(-1).mean() > (alone < 200).any(-1).mean()


def test_runs_have_a_curve_each_and_stars():
    rows = [
        {"name": name, "threshold": threshold, "mean_iou": 50 + number, "images_per_second": 2.0 + number}
        for name in "ab"
        for number, threshold in enumerate((None, 0.7, 0.8, 0.9))
    ]
    one = threshold_curves(rows[:4], {"a": 0.8})
    two = threshold_curves(rows, {"a": 0.8, "b": 0.7})
    blue, orange = (0, 114, 178), (213, 94, 0)
    assert shares(one, blue)[0] > 0 == shares(one, orange)[0] and shares(two, orange)[0] > 0
