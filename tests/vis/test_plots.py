"""Plots for the page."""

import re
from xml.etree import ElementTree

import numpy as np

from vis import hull, plots

NASTY = '<b>"a" & $x_1$</b>'


def texts(svg):
    """All texts of a drawing, which must be well-formed."""
    return [element.text for element in ElementTree.fromstring(svg).iter("text")]


POINTS = [("pure", 10.0, 70.0), (NASTY, 15.0, 69.0), ("slow", 9.0, 60.0), ("unknown", 9.0, float("nan"))]
LOGS = {"a": [{"epoch": 0, "train_loss": 1.0, "val_mean_iou": None}, {"epoch": 1, "train_loss": 0.5}], NASTY: []}
DRAWINGS = {
    "pareto": lambda: plots.pareto(POINTS, "images/s"),
    "class_iou": lambda: plots.class_iou(["sky", NASTY], {"pure": [90.0, float("nan")], NASTY: [80.0, 10.0]}),
    "training_curves": lambda: plots.training_curves(LOGS),
    "token_shares": lambda: plots.token_shares({NASTY: [10.0, 50.0], "b": [30.0]}, ["pure", "b", NASTY]),
}


def test_a_drawing_can_stand_in_any_page():
    """Readable on light and dark, with names as they are, the same every time, referring to itself alone."""
    all_ids = re.findall(r' id="([^"]*)"', plots.pareto(POINTS, "GFLOPs"))
    for draw in DRAWINGS.values():
        svg = draw()
        assert svg == draw() and svg.startswith("<svg") and "currentColor" in svg
        assert "http" not in svg and "<style" not in svg and "font-family" not in svg and "#ffffff" not in svg
        assert not re.search("black|#000000|#010203", svg)
        ids = re.findall(r' id="([^"]*)"', svg)
        assert set(re.findall(r'(?:href="|url\()#([^")]*)', svg)) == set(ids)
        assert any(NASTY in text for text in texts(svg) if text)
        assert ElementTree.fromstring(svg).get("aria-label")
        all_ids += ids
    assert len(all_ids) == len(set(all_ids))  # none twice, also not in two drawings


def hull_of(points):
    """points: (seconds per image, mIoU)."""
    return hull(*zip(*points, strict=True))


def test_the_hull_is_what_no_mixture_of_others_beats():
    assert hull([], []) == [] and hull_of([(1, 50)]) == [0]
    assert hull_of([(1, 50), (2, 60), (3, 61), (4, 60)]) == [0, 1, 2]
    assert hull_of([(1, 50), (2, 52), (3, 61)]) == [0, 2]  # half of the first and half of the last beat it
    assert hull_of([(1, 50), (1, 55), (2, 55)]) == [1]


def test_the_hull_against_its_definition():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [(float(x), float(y)) for x, y in zip(rng.uniform(1, 5, 12), rng.uniform(40, 60, 12), strict=True)]
        found = hull_of(points)
        times, scores = zip(*(points[i] for i in found), strict=True)
        assert list(times) == sorted(times) and list(scores) == sorted(scores)
        for seconds, score in points:
            assert score <= np.interp(seconds, times, scores) + 1e-9 and seconds >= times[0]
        for i in found[1:-1]:  # none of them lies on the line between two others
            others = [j for j in found if j != i]
            between = np.interp(points[i][0], *zip(*(points[j] for j in others), strict=True))
            assert points[i][1] > between


def test_labels_of_near_points_do_not_cover_each_other():
    svg = plots.pareto([(f"method {i}", 10 + 0.01 * i, 70.0) for i in range(5)] + [("far", 20, 60)], "images/s")
    places = [
        (float(element.get("x")), float(element.get("y")))
        for element in ElementTree.fromstring(svg).iter("text")
        if element.text.startswith("method")
    ]
    distances = [max(abs(a[0] - b[0]) / 20, abs(a[1] - b[1]) / 9) for a in places for b in places if a is not b]
    assert len(places) == 5 and min(distances) >= 1


def test_many_classes_stay_apart():
    svg = plots.class_iou([f"class {i}" for i in range(150)], {"a": np.linspace(0, 100, 150)})
    heights = sorted(
        float(element.get("y"))
        for element in ElementTree.fromstring(svg).iter("text")
        if element.text.startswith("class ")
    )
    assert len(heights) == 150 and np.diff(heights).min() > 11  # points; the text has 10


def test_training_shows_what_was_written_down():
    both = plots.training_curves(LOGS)
    assert "training loss" in texts(both) and "mIoU, %" not in texts(both) and "threshold τ" not in texts(both)
    curriculum = [{"epoch": i, "threshold": 0.95 - 0.01 * i} for i in range(3)]
    assert "threshold τ" in texts(plots.training_curves({"a": curriculum}))
    assert plots.training_curves({"a": []}).startswith("<svg")


def test_a_method_has_one_color_everywhere():
    svg = plots.token_shares({"b": [30.0]}, ["a", "b"])
    assert plots.COLORS[1] in svg and plots.COLORS[0] not in svg
    curves = plots.training_curves({"b": LOGS["a"]}, ["a", "b"])
    assert plots.COLORS[1] in curves and plots.COLORS[0] not in curves
