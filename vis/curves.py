"""Curves of measurements."""

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

BLUE, ORANGE = "#0072b2", "#d55e00"  # told apart by all kinds of colour vision


def threshold_curves(pure, rows, best=None):
    """mIoU, tokens and speed over the threshold, each with the unpatched model as a dashed line.

    Args:
        pure: measurements of the unpatched model: `mean_iou`, `tokens`, `images_per_second`.
        rows: the same with `threshold`.
        best: a threshold to mark, or None.

    Returns:
        (H, W, 3), uint8.
    """
    panels = {"mean_iou": "mIoU, %", "tokens": "tokens per image", "images_per_second": "images/s"}
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(11, 3.6), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        for axis, (key, label) in zip(figure.subplots(1, 3), panels.items(), strict=True):
            axis.plot([row["threshold"] for row in rows], [row[key] for row in rows], "o-", color=BLUE, markersize=4)
            axis.axhline(pure[key], color=ORANGE, linestyle="--", label="unpatched")
            if best is not None:
                axis.axvline(best, color="0.5", linestyle=":", label=f"lowest without loss: {best}")
            axis.set(xlabel="threshold (cosine similarity)", ylabel=label)
            axis.grid(color="0.9")
        figure.axes[0].legend(frameon=False, fontsize=9)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
