"""Conditional local average pooling (CLAP), the first step of ALGM (section 3.2)."""

import torch
import torch.nn.functional as F

from g2tm.reduction import Reduction
from g2tm.selection import selection, square_sums
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
    similarity = window_similarities(x, grid, window)
    n_tokens, n_windows = x.shape[1], similarity.shape[1]
    merged = (similarity >= threshold).sum(1)
    if batch == "uniform":
        merged = merged.min().expand_as(merged)
    order = similarity.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n_windows, device=x.device).expand_as(order))

    window_rank = _rank_of_patches(rank, grid, window)
    alone = window_rank >= merged[:, None]
    assignment = torch.where(alone, merged[:, None] + alone.cumsum(1) - 1, window_rank)
    return Reduction.of_counts(assignment, n_tokens - merged * (window[0] * window[1] - 1), sizes)


def _rank_of_patches(rank, grid, window):
    """Rank of the window that every patch lies in: (B, W) -> (B, gh·gw); W for patches in no whole window."""
    (gh, gw), (height, width) = grid, window
    rank = rank.unflatten(1, (gh // height, gw // width))
    spread = rank.repeat_interleave(height, dim=1).repeat_interleave(width, dim=2)
    return F.pad(spread, (0, gw % width, 0, gh % height), value=rank[0].numel()).flatten(1)


def window_similarities(x, grid, window):
    """Mean cosine similarity over the pairs of distinct tokens of each window.

    The sum over all pairs is the squared length of the sum of the unit vectors, less their own.

    Args:
        x: (B, gh·gw, D).
        grid: (gh, gw).
        window: patches per window, (height, width).

    Returns:
        (B, W), float32 (float64 for float64 tokens), -inf where a token is not finite; whole windows alone, in
        row-major order.
    """
    unit = F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)
    total = _window_sums(unit.unflatten(1, tuple(grid)), window)
    own = _window_sums(square_sums(unit).view(-1, *grid, 1), window).squeeze(-1)
    area = window[0] * window[1]
    similarity = (square_sums(total) - own) / (area * (area - 1))
    return similarity.clamp(-1, 1).nan_to_num(nan=float("-inf")).flatten(1)


def _window_sums(x, window):
    """Sum over every whole window: (B, gh, gw, D) -> (B, gh // height, gw // width, D)."""
    (gh, gw), (height, width) = x.shape[1:3], window
    rows, columns = gh // height, gw // width
    whole = x[:, : rows * height, : columns * width]
    return whole.unflatten(2, (columns, width)).sum(3).unflatten(1, (rows, height)).sum(2)
