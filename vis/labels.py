"""Label maps as pictures."""

import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

IGNORED = (0, 0, 0)


def colorize(labels: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """Color of every pixel's class; a label that is no class (255) becomes black.

    Args:
        labels: (H, W), integer.
        palette: (C, 3), uint8, RGB.

    Returns:
        (H, W, 3), uint8.
    """
    colors = np.tile(np.array(IGNORED, dtype=np.uint8), (len(palette) + 1, 1))
    colors[: len(palette)] = palette
    return colors[np.minimum(labels, len(palette))]


def blend(image: np.ndarray, colors: np.ndarray, opacity: float = 0.5) -> np.ndarray:
    """Lay one picture over another of the same size; both (H, W, 3), uint8."""
    return cv2.addWeighted(colors, opacity, image, 1 - opacity, 0)


def mark(image: np.ndarray, where: np.ndarray, color: tuple[int, int, int] = (214, 0, 130)) -> np.ndarray:
    """Pixels in a color that stands out, on a pale gray picture: (H, W, 3), uint8; where: (H, W), bool."""
    pale = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY) // 2 + 127
    return np.where(where[..., None], np.array(color, dtype=np.uint8), pale[..., None])


def legend(names: Sequence[str], palette: np.ndarray, height: int | None = None, row: int = 24) -> np.ndarray:
    """Class names next to their colors, in columns as wide as their longest name.

    Args:
        names: class names.
        palette: (C, 3), uint8, RGB.
        height: pixels; more classes than fit below each other go on in another column. None: one column.
        row: pixels of one line.

    Returns:
        (row·R, W, 3), uint8, on white; R: classes per column.
    """
    per_column = max(1, len(names) if height is None else min(len(names), height // row))
    starts = range(0, len(names), per_column)
    columns = [_legend_column(names[i : i + per_column], palette[i : i + per_column], per_column, row) for i in starts]
    return np.hstack(columns) if columns else np.full((row, 0, 3), 255, dtype=np.uint8)


def label_picture(labels: np.ndarray, names: Sequence[str], palette: np.ndarray, row: int = 24) -> np.ndarray:
    """A label map in its colors, and next to it the names of the classes that occur.

    Args:
        labels: (H, W), integer; a label that is no class is black and called ignored.
        names: class names.
        palette: (C, 3), uint8, RGB.
        row: pixels of one line of the legend.

    Returns:
        (H', W', 3), uint8, on white; the map lies at the upper left. H' > H only where H is less than one row.
    """
    present = np.unique(labels)
    classes = present[present < len(palette)]
    texts, colors = [names[i] for i in classes], np.asarray(palette)[classes]
    if len(classes) < len(present):
        texts, colors = [*texts, "ignored"], np.vstack([colors, [IGNORED]])
    parts = [colorize(labels, palette), legend(texts, colors, len(labels), row)]
    height = max(len(part) for part in parts)
    return np.hstack([np.pad(p, ((0, height - len(p)), (0, 0), (0, 0)), constant_values=255) for p in parts])


def magnification(shape: Sequence[int], shortest: int = 640) -> int:
    """Whole number by which a picture of (H, W) pixels is to be enlarged so that its shorter side is about `shortest`
    pixels; 1 if it is large enough."""
    return max(1, round(shortest / min(shape)))


def enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    """Every pixel as factor × factor pixels: (H, W, ...) -> (factor·H, factor·W, ...)."""
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


def _legend_column(names: Sequence[str], palette: np.ndarray, n_rows: int, row: int) -> np.ndarray:
    """(row·n_rows, W, 3), uint8."""
    font = _font(round(row * 0.58))
    width = 38 + max(math.ceil(font.getlength(name)) for name in names) + 12
    picture = Image.new("RGB", (width, row * n_rows), "white")
    draw = ImageDraw.Draw(picture)
    for index, (name, color) in enumerate(zip(names, palette, strict=True)):
        top = index * row
        draw.rectangle((6, top + 4, 29, top + row - 5), fill=tuple(map(int, color)), outline=(128, 128, 128))
        draw.text((38, top + row / 2), name, fill="black", font=font, anchor="lm")
    return np.asarray(picture)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib and, unlike OpenCV's fonts, knows more than ASCII."""
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"), size)
