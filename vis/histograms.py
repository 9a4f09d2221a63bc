"""Distributions of token counts and sizes."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vis.curves import BLUE, ORANGE, STYLE

N_BINS = 30


def token_histograms(layers: Mapping[int, Mapping[str, Any]]) -> np.ndarray:
    """Histograms of the tokens that images keep and of the sizes of merged ones, a row of panels per layer.

    Args:
        layers: 1-based layer -> dict of `n_patches` (int), `counts` (images,) and `sizes` (tokens,), the sizes other
            than 1.

    Returns:
        (H, W, 3), uint8.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 2.8 * len(layers)), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for axes, (layer, found) in zip(figure.subplots(len(layers), 2, squeeze=False), layers.items(), strict=True):
            _draw_counts(axes[0], layer, found["counts"], found["n_patches"])
            _draw_sizes(axes[1], layer, found["sizes"])
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def similarity_histograms(layers: Mapping[int, np.ndarray]) -> np.ndarray:
    """Histograms of the similarities of neighboring patches, one curve per layer.

    Args:
        layers: 1-based layer -> cosine similarities, any shape.

    Returns:
        (H, W, 3), uint8.
    """
    bins = np.linspace(min(0.0, *(values.min() for values in layers.values())), 1, 81)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2), dpi=100, layout="constrained")
        canvas, axis = FigureCanvasAgg(figure), figure.subplots()
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.92, len(layers)))
        for color, (layer, values) in zip(colors, layers.items(), strict=True):
            share, _ = np.histogram(values.ravel(), bins)
            axis.plot((bins[1:] + bins[:-1]) / 2, 100 * share / values.size, color=color, label=f"layer {layer}")
        axis.set(xlabel="cosine similarity of neighboring patches after attention", ylabel="pairs, %")
        axis.set(yscale="log", ylim=(0.05, 100))  # in a last layer nearly all are alike
        axis.grid(color="0.9")
        axis.legend(frameon=False, fontsize=9, ncols=2)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def _draw_counts(axis: Axes, layer: int, counts: np.ndarray, n_patches: int) -> None:
    bins = np.linspace(0, n_patches, min(N_BINS, n_patches) + 1)
    axis.hist(counts, bins=bins, color=BLUE)
    axis.axvline(np.mean(counts), color=ORANGE, linestyle="--", label=f"mean {np.mean(counts):.0f}")
    axis.axvline(n_patches, color="0.5", linestyle=":", label=f"unmerged {n_patches}")
    axis.set(title=f"after layer {layer}", xlabel="tokens per image", ylabel="images")
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(frameon=False, fontsize=9)


def _draw_sizes(axis: Axes, layer: int, sizes: np.ndarray) -> None:
    """In classes that double, since groups range from two patches to most of an image."""
    axis.set(title=f"after layer {layer}", xlabel="patches per merged token", ylabel="tokens")
    if not len(sizes):
        axis.text(0.5, 0.5, "nothing merged", ha="center", va="center", transform=axis.transAxes)
        return
    place = np.ceil(np.log2(np.maximum(sizes, 2))).astype(int) - 1  # 2 | 3-4 | 5-8 | ...
    names = ["2", *(f"{2**k + 1}-{2 ** (k + 1)}" for k in range(1, place.max() + 1))]
    bars = axis.bar(names, np.bincount(place), color=BLUE)
    axis.bar_label(bars, fontsize=8)
    axis.tick_params(axis="x", labelsize=8 if len(names) < 9 else 6)
    axis.set_title(f"after layer {layer}: mean size {np.mean(sizes):.1f}")
