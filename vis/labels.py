"""Label maps as pictures."""

import cv2
import numpy as np

IGNORED = (0, 0, 0)


def colorize(labels, palette):
    """Color of every pixel's class; what is no class (255) becomes black.

    Args:
        labels: (H, W), integer.
        palette: (C, 3), uint8, RGB.

    Returns:
        (H, W, 3), uint8.
    """
    colors = np.tile(np.array(IGNORED, dtype=np.uint8), (256, 1))
    colors[: len(palette)] = palette
    return colors[np.asarray(labels).astype(np.uint8)]


def blend(image, colors, opacity=0.5):
    """Lay one picture over another of the same size; both (H, W, 3), uint8."""
    return cv2.addWeighted(colors, opacity, image, 1 - opacity, 0)


def legend(names, palette, width=200, row=24):
    """Class names beside their colors.

    Args:
        names: class names.
        palette: (C, 3), uint8, RGB.
        width, row: pixels of the picture's width and of one line.

    Returns:
        (row·C, width, 3), uint8, on white.
    """
    picture = np.full((row * len(names), width, 3), 255, dtype=np.uint8)
    for index, (name, color) in enumerate(zip(names, palette, strict=True)):
        top = index * row
        picture[top + 4 : top + row - 4, 6:30] = color
        cv2.putText(picture, name, (38, top + row - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return picture
