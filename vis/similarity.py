"""Similarities of tokens: over an image, and by class over layers and windows."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from vis.curves import STYLE

MOST_CURVES = 5  # of a panel, in one color each
COLOR_MAP = "viridis"


def similarity_map(values: np.ndarray, window: tuple[int, int]) -> np.ndarray:
    """The similarities of the tokens in the windows of an image, with a scale.

    Args:
        values: (rows, columns), a mean cosine similarity per window.
        window: patches, (height, width).

    Returns:
        (H, W, 3), uint8; windows have the proportions of their patches, taken as squares.
    """
    rows, columns = values.shape
    aspect = rows * window[0] / (columns * window[1])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 0.5 + 6.2 * aspect), dpi=100, layout="constrained")
        canvas, axis = FigureCanvasAgg(figure), figure.subplots()
        image = axis.imshow(values, cmap=COLOR_MAP, vmax=1, aspect=window[0] / window[1])
        axis.set_axis_off()
        name = f"mean cosine similarity in windows of {window[0]} × {window[1]} patches"
        figure.colorbar(image, ax=axis, label=name)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def class_similarity_curves(rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Similarities within classes (solid) and between classes (dashed): over window sizes, and over layers.

    Args:
        rows: `layer`; `window`, patches, 0 for the whole image, which comes last; `same` and `different`, mean cosine
            similarities of pairs of one class and of different classes, None where there is no pair.

    Returns:
        (H, W, 3), uint8.
    """
    names = {size: f"{size}×{size}" if size else "image" for size in dict.fromkeys(row["window"] for row in rows)}
    layers = {layer: f"layer {layer}" for layer in dict.fromkeys(row["layer"] for row in rows)}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        left, right = figure.subplots(1, 2, sharey=True)
        _draw_curves(left, rows, "layer", layers, "window", list(names))
        left.set_xticks(range(len(names)), list(names.values()))
        left.set(xlabel="window, patches", ylabel="mean cosine similarity of two tokens")
        _draw_curves(right, rows, "window", names, "layer", list(layers))
        right.set_xticks(range(len(layers)), list(layers))
        right.set_xlabel("layer")
        kinds = [Line2D([], [], color="0.3", linestyle=dash) for dash in ("-", "--")]
        figure.legend(kinds, ["same class", "different classes"], loc="outside upper center", ncols=2, frameon=False)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_curves(
    axis: Axes, rows: Sequence[Mapping[str, Any]], key: str, names: Mapping[int, str], along: str, order: Sequence[int]
) -> None:
    """Two curves for each value of a key, of at most `MOST_CURVES` of them, spread over all."""
    values = [*names]
    count = min(MOST_CURVES, len(values))
    chosen = [values[round(index * (len(values) - 1) / max(count - 1, 1))] for index in range(count)]
    colors = matplotlib.colormaps[COLOR_MAP](np.linspace(0, 0.85, count))
    for value, color in zip(chosen, colors, strict=True):
        own = {row[along]: row for row in rows if row[key] == value}
        for kind, dash in (("same", "-"), ("different", "--")):
            heights = [np.nan if own[one][kind] is None else own[one][kind] for one in order]
            label = names[value] if kind == "same" else None
            axis.plot(range(len(order)), heights, dash, color=color, marker="o", markersize=4, label=label)
    axis.grid(color="0.9")
    axis.legend(frameon=False, fontsize=9)
