"""Attention as pictures."""

from collections.abc import Sequence

import cv2
import matplotlib
import numpy as np

from vis.tokens import outline_tokens, pixel_groups

COLORS = "magma"  # perceptually uniform, and its brightness alone tells the weight
SIGMA = 10.0  # pixels
QUERY = (0, 255, 255)  # cyan: not in the color map


def spread_weights(weights: np.ndarray, assignment: np.ndarray | None = None) -> np.ndarray:
    """Attention weights of the patches from those of the tokens that carry them.

    The weight of a merged token is shown on each of its patches as it is: it is what the query gives to the token as
    a whole, not shared out, so a large token looks as bright as a single patch of the same weight.

    Args:
        weights: (..., M), per token, prefix tokens and class tokens left out.
        assignment: (N,), integer; the token of every patch. None: nothing was merged, N = M.

    Returns:
        (..., N).
    """
    weights = np.asarray(weights)
    return weights if assignment is None else weights[..., np.asarray(assignment)]


def attention_map(
    weights: np.ndarray, grid: tuple[int, int], patch_size: tuple[int, int], shape: Sequence[int], sigma: float = SIGMA
) -> np.ndarray:
    """Attention over the pixels: constant on a patch, then smoothed.

    Args:
        weights: (gh·gw,), per patch, row-major, not negative.
        grid: (gh, gw).
        patch_size: pixels per patch, (height, width).
        shape: (H, W) of the picture; it may be smaller than the padded grid, whose rest is left out.
        sigma: standard deviation of the Gaussian, pixels of the picture; 0: no smoothing.

    Returns:
        (H, W), float32, scaled to 0 (no attention) to 1 (the most in this picture).
    """
    pixels = pixel_groups(np.asarray(weights, dtype=np.float32), grid, patch_size)[: shape[0], : shape[1]]
    smooth = cv2.GaussianBlur(pixels, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE) if sigma else pixels
    highest = smooth.max()
    return smooth / highest if highest > 0 else np.zeros_like(smooth)


def color_attention(values: np.ndarray) -> np.ndarray:
    """values: (H, W) in [0, 1] -> (H, W, 3), uint8: black, purple, orange, pale yellow."""
    return matplotlib.colormaps[COLORS](values, bytes=True)[..., :3].copy()


def overlay_attention(image: np.ndarray, values: np.ndarray, opacity: tuple[float, float] = (0.3, 0.8)) -> np.ndarray:
    """Attention over the photograph in grey, so that all color is attention.

    Args:
        image: (H, W, 3), uint8.
        values: (H, W), in [0, 1].
        opacity: of the color, where there is no attention and where there is the most.

    Returns:
        (H, W, 3), uint8.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)[..., None]
    share = (opacity[0] + (opacity[1] - opacity[0]) * np.asarray(values, dtype=np.float32))[..., None]
    return (grey + share * (color_attention(values) - grey)).round().astype(np.uint8)


def attention_pictures(
    image: np.ndarray,
    weights: np.ndarray,
    grid: tuple[int, int],
    patch_size: tuple[int, int],
    assignment: np.ndarray | None = None,
    query: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The two pictures of one query and one head.

    Args:
        image: (H, W, 3), uint8, the photograph.
        weights: (M,), of the tokens that carry patches.
        grid, patch_size: as in `attention_map`.
        assignment: (gh·gw,), as in `spread_weights`.
        query: index of a patch, row-major, whose token is outlined in the overlay; None: the query is no patch.

    Returns:
        (map, overlay on the photograph), each (H, W, 3), uint8.
    """
    values = attention_map(spread_weights(weights, assignment), grid, patch_size, image.shape[:2])
    overlay = overlay_attention(image, values)
    if query is not None:
        tokens = np.arange(grid[0] * grid[1]) if assignment is None else np.asarray(assignment)
        overlay = outline_tokens(overlay, tokens == tokens[query], grid, patch_size, QUERY)
    return color_attention(values), overlay
