"""The confusion matrix of a segmentation."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

WRITTEN = 25  # classes: in cells of more, numbers cannot be read


def confusion_picture(confusion: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """A confusion matrix in shares of the true classes: the cells of a row sum to 100 %.

    Args:
        confusion: (C, C), pixels; rows are true classes, columns predicted ones. Classes that occur in neither are left
            out.
        names: of the classes.

    Returns:
        (H, W, 3), uint8, RGB.
    """
    totals = confusion.sum(1)
    shown = np.flatnonzero(totals + confusion.sum(0))
    labels = [names[index] for index in shown]
    share = (100 * confusion / np.maximum(totals, 1)[:, None])[np.ix_(shown, shown)]
    side = 1.5 + max(2.5, min(0.42 * len(shown), 24))
    with matplotlib.rc_context({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(side + 1, side), dpi=120, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axis = figure.subplots()
        image = axis.imshow(share, cmap="Blues", vmin=0, vmax=100)
        small = 9 if len(shown) <= WRITTEN else 5
        axis.set_xticks(range(len(shown)), labels, rotation=90, fontsize=small)
        axis.set_yticks(range(len(shown)), labels, fontsize=small)
        axis.set(xlabel="predicted class", ylabel="true class")
        figure.colorbar(image, ax=axis, label="% of the pixels of the true class", shrink=0.8)
        for (row, column), value in np.ndenumerate(share) if len(shown) <= WRITTEN else ():
            if value >= 0.5:
                color = "white" if value > 60 else "black"
                axis.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
