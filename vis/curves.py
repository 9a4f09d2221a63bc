"""Curves of measurements."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # told apart by all kinds of color vision


LINES = [
    {"color": color, "marker": marker, "markersize": 4} for color, marker in ((BLUE, "o"), (ORANGE, "s"), (GREEN, "D"))
]


MARKERS = "osD^vP*X<>hp"
PALETTE = (BLUE, ORANGE, GREEN, "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999933")  # after Okabe and Ito
DASHES = ("-", "--", ":")  # after each use of all colors the next one
DEEPEST = 15  # points below the best: what loses more leaves the picture
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def hull(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """The points that no mixture of two others beats: the upper convex hull of the scores over the costs.

    A mixture of two settings, used in turn, reaches every point of the line between them.

    Args:
        costs: better if smaller, such as seconds per image.
        scores: better if larger; as many.

    Returns:
        Indices of the points, the lowest cost first.
    """
    order = sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i]))
    found: list[int] = []
    for index in order:
        if found and scores[index] <= max(scores[i] for i in found):
            continue
        while len(found) > 1 and not _is_above(found[-1], found[-2], index, costs, scores):
            found.pop()
        found.append(index)
    return found


def _is_above(middle: int, first: int, last: int, x: Sequence[float], y: Sequence[float]) -> bool:
    """Return whether the middle one of three points lies above the line between the others."""
    return (y[middle] - y[first]) * (x[last] - x[first]) > (y[last] - y[first]) * (x[middle] - x[first])


def tradeoff_plot(
    rows: Sequence[Mapping[str, Any]],
    labels: Sequence[str],
    score: str = "mean_iou",
    name: str = "mIoU, %",
    tokens: bool = False,
) -> np.ndarray:
    """A score over the time per image, with the hull, or over the tokens: one line per label.

    The axis ends 15 points below the best score, so that differences between good settings can be seen.

    Args:
        rows: `images_per_second` (or `tokens`) and the score.
        labels: one per row; rows of one label are joined, in order of their time.
        score: key; name: of its axis.
        tokens: over the tokens per image instead of the time.

    Returns:
        (H, W, 3), uint8.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
        canvas, axis = FigureCanvasAgg(figure), figure.subplots()
        points = [(row["tokens"] if tokens else 1000 / row["images_per_second"], row[score]) for row in rows]
        if not tokens:
            best = [points[index] for index in hull(*zip(*points, strict=True))]
            axis.plot(
                *zip(*best, strict=True), color="0.75", linewidth=6, solid_capstyle="round", label="hull", zorder=0
            )
        for number, label in enumerate(dict.fromkeys(labels)):
            own = sorted(point for point, other in zip(points, labels, strict=True) if other == label)
            color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
            dashes = DASHES[number // len(PALETTE) % len(DASHES)]
            line = {"linestyle": dashes, "linewidth": 1, "markersize": 5}
            if len(own) == 1:  # lines of others run across it
                line = {"linestyle": "none", "markersize": 9, "zorder": 3}
            axis.plot(*zip(*own, strict=True), color=color, marker=marker, **line, label=label)
        axis.set(xlabel="tokens per image" if tokens else "ms per image", ylabel=name)
        top = max(y for _, y in points)
        bottom = max(axis.get_ylim()[0], top - DEEPEST)
        axis.set_ylim(bottom, top + max(top - bottom, 1) / 20)
        axis.grid(color="0.9")
        axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5), handlelength=3)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def search_plot(
    tried: Sequence[Mapping[str, Any]], last: Sequence[Mapping[str, Any]], chosen: Mapping[str, Mapping[str, Any]]
) -> np.ndarray:
    """Settings over the time per image: all that were tried, the last ones with their hull, and those with a name.

    Args:
        tried: `ms`, `loss` of mIoU and `method`, as they were screened.
        last: `ms` and `loss`, as they were measured.
        chosen: name -> one of the last.

    Returns:
        (H, W, 3), uint8.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 5), dpi=100, layout="constrained")
        canvas, axis = FigureCanvasAgg(figure), figure.subplots()
        for number, method in enumerate(dict.fromkeys(one["method"] for one in tried)):
            own = [(one["ms"], -one["loss"]) for one in tried if one["method"] == method]
            color = PALETTE[number % len(PALETTE)]
            axis.plot(*zip(*own, strict=True), ".", color=color, alpha=0.5, label=f"{method}, screened")
        points = [(one["ms"], -one["loss"]) for one in last]
        axis.plot(*zip(*points, strict=True), "ko", markersize=4, label="measured on all images")
        best = [points[index] for index in hull(*zip(*points, strict=True))]
        axis.plot(*zip(*best, strict=True), color="0.75", linewidth=6, solid_capstyle="round", label="hull", zorder=0)
        for number, (name, one) in enumerate(chosen.items()):
            place = {"xytext": (10, -18 - 14 * number), "textcoords": "offset points"}
            arrow = {"arrowstyle": "-", "color": "0.5"}
            axis.annotate(name, (one["ms"], -one["loss"]), **place, fontweight="bold", arrowprops=arrow)
        low = min(y for _, y in points)
        axis.set(xlabel="ms per image", ylabel="mIoU against the plain model", xlim=(0, None))
        axis.set_ylim(max(low - max(1, -low / 2), -DEEPEST), max(1, axis.get_ylim()[1]))
        axis.grid(color="0.9")
        axis.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def threshold_curves(rows: Sequence[Mapping[str, Any]], automatic: Mapping[str, float]) -> np.ndarray:
    """mIoU and speed of runs over the threshold, with a star at the automatic one; dotted: nothing merges.

    Args:
        rows: `name` of the run, `threshold` (None: nothing merges), `mean_iou` and `images_per_second`.
        automatic: name -> the automatic threshold, which is among the rows.

    Returns:
        (H, W, 3), uint8.
    """
    panels = {"mean_iou": "mIoU, %", "images_per_second": "images/s"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for axis, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for number, (name, auto) in enumerate(automatic.items()):
                color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
                own = {row["threshold"]: row[key] for row in rows if row["name"] == name}
                plain, points = own.pop(None), sorted(own.items())
                axis.plot(*zip(*points, strict=True), color=color, marker=marker, markersize=4, label=name)
                axis.axhline(plain, color=color, linestyle=":", linewidth=1)
                axis.plot(auto, own[auto], "*", color=color, markersize=15, markeredgecolor="white", zorder=3)
            axis.set(xlabel="threshold τ", ylabel=label)
            axis.grid(color="0.9")
        kinds = [Line2D([], [], color="0.3", linestyle=":"), Line2D([], [], color="0.3", marker="*", linestyle="none")]
        handles, names = axis.get_legend_handles_labels()
        names += ["nothing merges", "automatic τ"]
        figure.legend([*handles, *kinds], names, loc="outside upper center", ncols=min(len(names), 5), frameon=False)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def scale_curves(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Time and memory per patch over the number of patches, one line per method; flat lines are linear costs.

    Args:
        rows: dicts of `method`, `patches`, `microseconds_per_patch` and `kib_per_patch` (None: unknown).

    Returns:
        (H, W, 3), uint8.
    """
    panels = {"microseconds_per_patch": "microseconds per patch", "kib_per_patch": "peak KiB per patch"}
    methods = dict.fromkeys(row["method"] for row in rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for axis, (key, label) in zip(figure.subplots(1, 2), panels.items(), strict=True):
            for method, style in zip(methods, LINES * len(methods), strict=False):
                points = [
                    (row["patches"], row[key]) for row in rows if row["method"] == method and row[key] is not None
                ]
                axis.plot(*zip(*points, strict=True) if points else ([], []), label=method, **style)
            axis.set(xlabel="patches", ylabel=label, xscale="log", ylim=(0, None))
            numbers = sorted({row["patches"] for row in rows})
            axis.set_xticks(numbers, numbers, fontsize=8)
            axis.minorticks_off()
            axis.grid(color="0.9")
        figure.axes[0].legend(frameon=False, fontsize=9)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
