"""Merged tokens as pictures. All work grows with the number of pixels alone, whatever the number of groups."""

import cv2
import numpy as np

OUTLINE = (255, 255, 0)  # yellow: seen by all kinds of colour vision, and rare in photographs


def pixel_groups(assignment, grid, patch_size):
    """Group of every pixel.

    Args:
        assignment: (gh·gw,), integer; the group of every patch, row-major.
        grid: (gh, gw).
        patch_size: pixels per patch, (height, width).

    Returns:
        (gh·ph, gw·pw), integer.
    """
    groups = np.asarray(assignment).reshape(grid)
    return groups.repeat(patch_size[0], axis=0).repeat(patch_size[1], axis=1)


def fill_tokens(image, assignment, grid, patch_size):
    """Fill every group with the mean color of its pixels and outline it.

    Args:
        image: (H, W, 3), uint8; it may be smaller than the padded grid.
        assignment, grid, patch_size: see `pixel_groups`.

    Returns:
        (H, W, 3), uint8.
    """
    groups = pixel_groups(assignment, grid, patch_size)[: image.shape[0], : image.shape[1]]
    n_pixels = np.bincount(groups.ravel()).clip(min=1)
    channels = [np.bincount(groups.ravel(), weights=image[..., c].ravel()) / n_pixels for c in range(3)]
    colors = np.stack(channels, axis=1).round().astype(np.uint8)
    return _draw(colors[groups], groups, (255, 255, 255), 1)


def outline_tokens(image, assignment, grid, patch_size, color=OUTLINE):
    """Draw the borders between groups on the photograph; arguments as in `fill_tokens`."""
    groups = pixel_groups(assignment, grid, patch_size)[: image.shape[0], : image.shape[1]]
    return _draw(image, groups, color, max(1, min(image.shape[:2]) // 400))


def _draw(image, groups, color, thickness):
    """Color the pixels on both sides of every border between two groups."""
    border = np.zeros(groups.shape, dtype=np.uint8)
    border[:, 1:] |= groups[:, 1:] != groups[:, :-1]
    border[1:] |= groups[1:] != groups[:-1]
    if thickness > 1:
        border = cv2.dilate(border, np.ones((thickness, thickness), np.uint8))
    drawn = image.copy()
    drawn[border.astype(bool)] = color
    return drawn
