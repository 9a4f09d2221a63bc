"""Conditional local average pooling (CLAP), the first step of ALGM (section 3.2)."""

import torch
import torch.nn.functional as F

from g2tm.reduction import Reduction
from g2tm.selection import selection
from g2tm.validation import check_batch, check_grid, check_threshold, check_window


@selection
def clap(x, grid, threshold, *, window=(2, 2), sizes=None, batch="ragged"):
    """Merge every window of the grid whose tokens are alike.

    Args:
        x: (B, N, D), patch tokens in row-major order.
        grid: (gh, gw) with gh·gw = N; windows that hang over its edge are not merged.
        threshold: a window merges if the mean cosine similarity of its pairs is at least this; from -1 to 1.
        window: patches per window, (height, width).
        sizes: (B, N), patches that each token carries already; None: one each.
        batch: "ragged": every image keeps its own number of tokens. "uniform": every image merges as many windows
            as the image that merges least, the most similar ones.

    Returns:
        A `Reduction`; merged windows come first, by falling similarity, then the other tokens in their old order.

    Raises:
        ValueError: a threshold, grid, window or batch mode that is not allowed.
    """
    check_threshold(threshold)
    check_grid(grid, x.shape[1])
    check_window(window, grid)
    check_batch(batch)
    windows = grid_windows(grid, window, x.device)
    n_windows, area = windows.shape
    similarity = window_similarities(x, windows)
    merged = (similarity >= threshold).sum(1)
    if batch == "uniform":
        merged = merged.min().expand_as(merged)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n_windows, device=x.device).expand_as(order))

    n_images, n_tokens = x.shape[:2]
    window_rank = torch.full((n_images, n_tokens), n_windows, device=x.device)  # of the window that a patch lies in
    window_rank[:, windows.flatten()] = rank.repeat_interleave(area, dim=1)
    alone = window_rank >= merged[:, None]
    assignment = torch.where(alone, merged[:, None] + alone.cumsum(1) - 1, window_rank)
    return Reduction.of_counts(assignment, n_tokens - merged * (area - 1), sizes)


def grid_windows(grid, window, device=None):
    """Patches of every whole window: (W, height·width), int64, windows and the patches in them in row-major order."""
    (gh, gw), (height, width) = grid, window
    rows, columns = gh // height, gw // width
    index = torch.arange(gh * gw, device=device).view(gh, gw)[: rows * height, : columns * width]
    return index.reshape(rows, height, columns, width).transpose(1, 2).reshape(rows * columns, height * width)


def window_similarities(x, windows):
    """Mean cosine similarity over the pairs of distinct tokens of each window.

    The sum over all pairs is the squared length of the sum of the unit vectors, less their own.

    Args:
        x: (B, N, D).
        windows: (W, A), see `grid_windows`.

    Returns:
        (B, W), float32 (float64 for float64 tokens), -inf where a token is not finite.
    """
    x = x if x.dtype == torch.float64 else x.float()
    unit = F.normalize(x, dim=-1)[:, windows]
    total, area = unit.sum(2), windows.shape[1]
    own = unit.square().sum((2, 3))
    similarity = (total.square().sum(-1) - own) / (area * (area - 1))
    return similarity.clamp(-1, 1).nan_to_num(nan=float("-inf"))
