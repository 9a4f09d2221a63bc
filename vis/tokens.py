"""Merged tokens as pictures. All work grows with the number of pixels alone, whatever the number of groups."""

import numpy as np

OUTLINE = (255, 255, 0)  # yellow: seen by all kinds of color vision, and rare in photographs
DARK = (0, 0, 0)
DARK_SIDE_FROM = 16  # pixels per patch


def pixel_groups(assignment: np.ndarray, grid: tuple[int, int], patch_size: tuple[int, int]) -> np.ndarray:
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


def fill_tokens(
    image: np.ndarray, assignment: np.ndarray, grid: tuple[int, int], patch_size: tuple[int, int]
) -> np.ndarray:
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
    return _draw(colors[groups], groups, (255, 255, 255), min(patch_size))


def outline_tokens(
    image: np.ndarray,
    assignment: np.ndarray,
    grid: tuple[int, int],
    patch_size: tuple[int, int],
    color: tuple[int, int, int] = OUTLINE,
) -> np.ndarray:
    """Draw the borders between groups on the photograph; arguments as in `fill_tokens`."""
    groups = pixel_groups(assignment, grid, patch_size)[: image.shape[0], : image.shape[1]]
    return _draw(image, groups, color, min(patch_size))


def token_pictures(
    image: np.ndarray, assignment: np.ndarray, grid: tuple[int, int], patch_size: tuple[int, int]
) -> dict[str, np.ndarray]:
    """Pictures of the merged tokens, by the ending of their file names; arguments as in `fill_tokens`.

    Returns:
        `vis_<M>_tokens` (filled) and `vis_<M>_tokens_overlay` (outlined) where M < gh·gw tokens are left, `grid` (every
        patch outlined) where nothing was merged; each (H, W, 3), uint8.
    """
    n_tokens = len(np.unique(assignment))
    outlined = outline_tokens(image, assignment, grid, patch_size)
    if n_tokens == grid[0] * grid[1]:
        return {"grid": outlined}
    name = f"vis_{n_tokens}_tokens"
    return {name: fill_tokens(image, assignment, grid, patch_size), f"{name}_overlay": outlined}


def _draw(image: np.ndarray, groups: np.ndarray, color: tuple[int, int, int], patch_side: int) -> np.ndarray:
    """Color the pixels after every border between two groups; where patches have room for it, those before it become
    dark, so that the line stands out from bright ground too."""
    right, below = groups[:, 1:] != groups[:, :-1], groups[1:] != groups[:-1]
    drawn = image.copy()
    if patch_side >= DARK_SIDE_FROM:
        drawn[:, :-1][right] = DARK
        drawn[:-1][below] = DARK
    drawn[:, 1:][right] = color
    drawn[1:][below] = color
    return drawn
