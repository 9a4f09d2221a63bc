"""Plots for a web page: SVG to be set into HTML. Text and axes take the color of the page's text, so that one version
serves light and dark."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from vis.curves import BLUE, ORANGE, hull

COLORS = (BLUE, ORANGE, "#009e73", "#cc79a7", "#56b4e9", "#e69f00")  # Okabe-Ito, those that show on white and on black
MARKERS = "osD^vPX"  # one more marker than colors: 42 pairs before one comes twice
INK = "#010203"  # becomes the color of the page's text
STYLE = {
    "font.size": 10,
    "text.parse_math": False,  # names are no formulas
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    "grid.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}
N_BINS = 40


def pareto(points: Sequence[tuple[str, float, float]], xlabel: str, *, larger_is_better: bool = True) -> str:
    """mIoU over a speed or a cost; a line joins the points that no mixture of two others beats.

    Args:
        points: list of (name, x, mIoU in percent); those whose mIoU is not finite are left out.
        xlabel: of x.
        larger_is_better: x is a speed; else a cost.

    Returns:
        SVG text.
    """
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(5.6, 4.2)
        shown = [(index, *point) for index, point in enumerate(points) if math.isfinite(point[2])]
        x, y = [point[2] for point in shown], [point[3] for point in shown]
        best = hull([1 / one if larger_is_better else one for one in x], y)
        axis.plot([x[i] for i in best], [y[i] for i in best], "--", color=INK, alpha=0.5, linewidth=1)
        for index, _, at, score in shown:
            axis.plot(at, score, markersize=8, linestyle="none", **_style(index))
        axis.margins(0.18)
        axis.set(xlabel=xlabel, ylabel="mIoU, %")
        axis.grid()
        _label_points(figure, axis, [point[1] for point in shown], x, y)
        words = "; ".join(f"{name}: {score:.2f} % at {x:.3g} {xlabel}" for name, x, score in points)
        return _svg(figure, f"pareto-{xlabel}", f"mIoU over {xlabel}. {words}")


def class_iou(classes: Sequence[str], scores: Mapping[str, Sequence[float | None]]) -> str:
    """IoU of every class, one row per class, best class first.

    Args:
        classes: names.
        scores: name of a method -> IoU per class in percent, NaN where a class does not occur.

    Returns:
        SVG text; its height grows with the number of classes.
    """
    values = np.array([list(iou) for iou in scores.values()], dtype=float).reshape(len(scores), len(classes))
    order = sorted(range(len(classes)), key=lambda i: -_mean(values[:, i]))
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(7.6, 0.9 + 0.22 * len(classes) + 0.2 * math.ceil(len(scores) / 4))
        rows = np.arange(len(classes))
        for row, index in enumerate(order):
            known = values[:, index][np.isfinite(values[:, index])]
            if len(known) > 1:
                axis.plot([known.min(), known.max()], [row, row], color=INK, alpha=0.35, linewidth=1, zorder=1)
        for method, (name, iou) in enumerate(zip(scores, values, strict=True)):
            axis.plot(iou[order], rows, label=name, linestyle="none", markersize=5.5, **_style(method))
        axis.set_yticks(rows, [classes[i] for i in order])
        known = values[np.isfinite(values)]
        lowest = 10 * math.floor(known.min() / 10) if len(known) else 0
        axis.set(xlabel="IoU, %", xlim=(lowest - 1, 101), ylim=(len(classes) - 0.4, -0.6))
        axis.tick_params(axis="y", length=0)
        axis.tick_params(axis="x", labeltop=len(classes) > 30)
        axis.grid()
        figure.legend(loc="outside upper left", ncols=4, handletextpad=0.2)
        label = f"IoU of {len(classes)} classes by method; the numbers are in the JSON file next to this page"
        return _svg(figure, "class-iou", label)


CURVES = {
    "train_loss": "training loss",
    "val_mean_iou": "mIoU, %",
    "train_learning_rate": "learning rate",
    "threshold": "threshold τ",
}


def training_curves(logs: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str] | None = None) -> str:
    """The logs of trainings, over their epochs.

    Args:
        logs: name -> list of dicts with `epoch` and some of `train_loss`, `val_mean_iou` (percent),
            `train_learning_rate`, `threshold`; what is missing or None is left out.
        names: of all methods on the page, whose order gives everyone its color and marker; None: those of the logs.

    Returns:
        SVG text, a panel for every quantity that occurs; the threshold only if one changes.
    """
    names = list(names or logs)
    panels = [key for key in CURVES if any(_points(log, key) for log in logs.values())]
    if not any(len({value for _, value in _points(log, "threshold")}) > 1 for log in logs.values()):
        panels = [key for key in panels if key != "threshold"]
    epochs = [entry["epoch"] for log in logs.values() for entry in log] or [0]
    first, last = min(epochs), max(epochs)
    margin = 0.04 * (last - first) + (0.1 if last > first else 0.5)  # one epoch alone has one tick
    with matplotlib.rc_context(STYLE):
        n_rows = max(1, math.ceil(len(panels) / 2))
        figure = Figure(figsize=(7.6, 0.5 + 2.3 * n_rows), layout="constrained")
        for axis, key in zip(figure.subplots(n_rows, 2, squeeze=False).flat, [*panels, None, None], strict=False):
            if key is None:
                axis.set_axis_off()
                continue
            for name, log in logs.items():
                points = np.array(_points(log, key), dtype=float).reshape(-1, 2)
                style = _style(names.index(name))
                axis.plot(*points.T, markersize=4, **style | {"marker": style["marker"] if len(points) < 30 else ""})
            axis.set(xlabel="epoch", ylabel=CURVES[key], xlim=(first - margin, last + margin))
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid()
        handles = [Line2D([], [], markersize=4, **_style(names.index(name))) for name in logs]
        figure.legend(handles, list(logs), loc="outside upper left", ncols=4)
        return _svg(figure, "training", f"Training curves of {', '.join(logs)}")


def layer_curves(curves: Mapping[str, Sequence[float]], ylabel: str) -> str:
    """A quantity over the layers of a model, a line per method.

    Args:
        curves: name -> a value after every layer.
        ylabel: of the values.

    Returns:
        SVG text.
    """
    with matplotlib.rc_context(STYLE):
        figure, axis = _figure(7.6, 3.4 + 0.2 * math.ceil(len(curves) / 4))
        for index, (name, values) in enumerate(curves.items()):
            axis.plot(range(1, len(values) + 1), values, label=name, markersize=4, **_style(index))
        axis.set(xlabel="layer", ylabel=ylabel)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid()
        figure.legend(loc="outside upper left", ncols=4)
        words = "; ".join(f"{name}: {values[-1]:.3f} after the last layer" for name, values in curves.items())
        return _svg(figure, "layers", f"{ylabel} over the layers. {words}")


def token_shares(shares: Mapping[str, np.ndarray], names: Sequence[str] | None = None) -> str:
    """Histograms of the tokens that images keep, a row per method.

    Args:
        shares: name -> (images,), percent of the patch tokens that are left.
        names: as in `training_curves`.

    Returns:
        SVG text.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 0.6 + 1.2 * len(shares)), layout="constrained")
        axes = figure.subplots(len(shares), 1, sharex=True, squeeze=False)[:, 0]
        for axis, (name, values) in zip(axes, shares.items(), strict=True):
            color = _style(list(names or shares).index(name))["color"]
            axis.hist(values, bins=np.linspace(0, 100, N_BINS + 1), color=color, alpha=0.85)
            axis.axvline(np.mean(values), color=INK, linestyle="--", linewidth=1)
            axis.set_title(f"{name}: {np.mean(values):.1f} % on average", loc="left", fontsize=10)
            axis.set(ylabel="images", xlim=(0, 100))
            axis.yaxis.get_major_locator().set_params(integer=True, nbins=3)
            axis.grid()
        axes[-1].set_xlabel("tokens left, % of the patches")
        words = "; ".join(f"{name}: {np.mean(values):.1f} %" for name, values in shares.items())
        return _svg(figure, "tokens", f"Tokens left on average. {words}")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of that many inches, with its only axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _style(index: int) -> dict[str, Any]:
    """Color and marker of a method by its place in the list."""
    return {"color": COLORS[index % len(COLORS)], "marker": MARKERS[index % len(MARKERS)]}


def _mean(values: np.ndarray) -> float:
    """Mean of the finite values; -1 if there is none."""
    known = values[np.isfinite(values)]
    return known.mean() if len(known) else -1.0


def _points(log: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """(epoch, value) of the entries that have the value."""
    return [(entry["epoch"], entry[key]) for entry in log if entry.get(key) is not None]


def _label_points(figure: Figure, axis: Axes, names: Sequence[str], x: Sequence[float], y: Sequence[float]) -> None:
    """Write every name next to its point, at the first of several free places."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # the layout is settled
    figure.set_layout_engine("none")
    renderer, frame = canvas.get_renderer(), axis.get_window_extent()
    centers: Any = axis.transData.transform(np.column_stack([x, y])) if names else []
    taken = [Bbox.from_extents(cx - 6, cy - 6, cx + 6, cy + 6) for cx, cy in centers]
    for name, at, score in zip(names, x, y, strict=True):
        free = []
        for dx, dy in _PLACES:
            align = "left" if dx > 0 else "right" if dx < 0 else "center"
            text = axis.annotate(
                name, (at, score), (dx, dy), textcoords="offset points", ha=align, va="center", fontsize=9
            )
            box = text.get_window_extent(renderer)
            free = [box.x0 > frame.x0, box.x1 < figure.bbox.x1, box.y0 > frame.y0, box.y1 < frame.y1]
            if all(free) and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:  # crowded: better on top of another than missing
            axis.annotate(name, (at, score), (9, 0), textcoords="offset points", va="center", fontsize=9)
        taken.append(box)


_PLACES = [(9, 0), (-9, 0), (0, 12), (0, -12), *((dx, dy) for dy in (12, -12, 24, -24) for dx in (9, -9))]


def _svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an SVG element for HTML with others: no ids but those that it refers to, which begin with its
    name, no style sheet, the font of the page, and nothing that changes from run to run.

    label: says to a screen reader what the figure shows.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ElementTree.fromstring(buffer.getvalue())
    slug = re.sub(r"\W+", "-", name)
    used = set(re.findall(r'(?:url\(|href=")#([^")]+)', buffer.getvalue()))
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for child in [child for child in element if child.tag.endswith("}style")]:
            element.remove(child)
        if element.tag != "text":
            element.text = None
        element.tail = None
        element.attrib = {
            key: _REFERENCE.sub(rf"\1{slug}-", value)
            for key, value in map(_for_page, element.attrib.items())
            if key != "id" or value in used
        }
        if "id" in element.attrib:
            element.set("id", f"{slug}-{element.get('id')}")
    root.attrib |= {"role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


_REFERENCE = re.compile(r"(^#|url\(#)")
_FONT = re.compile(r"font: ([\d.]+px)[^;]*|font-family:[^;]*;?")


def _for_page(attribute: tuple[str, str]) -> tuple[str, str]:
    """An SVG attribute as (name, value), without its namespace and with the font and color of the page."""
    key, value = attribute
    if key == "style":
        value = _FONT.sub(lambda found: f"font-size: {found[1]}" if found[1] else "", value)
        value = value.replace(INK, "currentColor")
    return key.rpartition("}")[2], " ".join(value.split())
