"""Several pictures on one sheet."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def picture_sheet(
    rows: Sequence[Sequence[np.ndarray]],
    columns: Sequence[str],
    captions: Sequence[Sequence[str]] | None = None,
    inches: float = 2.2,
) -> np.ndarray:
    """Pictures in rows and columns, with titles and captions.

    Args:
        rows: list of rows of (H, W, 3) uint8 pictures.
        columns: a title for every column.
        captions: rows of texts below the pictures, or None.
        inches: width of one picture on the sheet, at 100 dots per inch.

    Returns:
        (H, W, 3), uint8.
    """
    with matplotlib.rc_context({"font.size": 9}):
        tallest = [max(picture.shape[0] / picture.shape[1] for picture in row) for row in rows]
        height = inches * sum(tallest) + 0.2 * len(rows) * (captions is not None) + 0.3
        figure = Figure(figsize=(inches * len(columns), height), dpi=100, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.subplots(len(rows), len(columns), squeeze=False)
        for index, (row, row_axes) in enumerate(zip(rows, axes, strict=True)):
            for column, (picture, axis) in enumerate(zip(row, row_axes, strict=True)):
                axis.imshow(picture, interpolation="nearest")
                axis.set(xticks=[], yticks=[])
                if index == 0:
                    axis.set_title(columns[column], fontsize=9)
                if captions is not None:
                    axis.set_xlabel(captions[index][column], fontsize=8)
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., :3].copy()
