"""Conditional local average pooling (CLAP), the first step of ALGM (section 3.2)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import Grouping
from g2tm.selection import images_in, ranks, rows, selection, tokens_in, true_positions
from g2tm.similarity import LOWEST, row_dot, unit_vectors
from g2tm.validation import check_batch, check_grid, check_threshold, check_tokens, check_window


@selection
def clap(
    x: Tensor,
    grid: tuple[int, int],
    threshold: float | None,
    *,
    tokens: int | None = None,
    window: tuple[int, int] = (2, 2),
    sizes: Tensor | None = None,
    padding: Tensor | None = None,
    batch: str = "ragged",
) -> Grouping:
    """Merge every window of the grid whose tokens are alike.

    Merged windows come first, by falling similarity, then the other tokens in their old order.

    Args:
        x, grid, sizes, padding, batch: see `g2tm`; padding goes with a threshold. Windows that hang over the edge of
            the grid are not merged.
        threshold: a window merges if the mean cosine similarity of its pairs is at least this. Not used, and may be
            None, with `tokens`.
        tokens: instead, merge the most similar windows of every image until exactly so many tokens are left. The
            last of them merges only as many of its patches as are needed: those most similar to the mean of its unit
            vectors, of equal ones the first.
        window: patches per window, (height, width).
    """
    check_grid(grid, x.shape[1])
    check_window(window, grid)
    check_batch(batch)
    n_tokens, removed = int(x.shape[1]), window[0] * window[1] - 1  # by every window
    if tokens is None:
        check_threshold(threshold)
    else:
        check_tokens(tokens, n_tokens - (grid[0] // window[0]) * (grid[1] // window[1]) * removed, n_tokens, padding)
    if images_in(x) == 0:
        return Grouping.identity(x, sizes)
    similarity = window_similarities(x, grid, window)
    if padding is not None:
        inside = _window_sums(padding.view(-1, *grid, 1).float(), window)
        similarity = similarity.masked_fill(inside.flatten(1) > 0, LOWEST)
    rank = _rank_of_patches(ranks(similarity), grid, window)
    if tokens is not None:
        n_merged, rest = divmod(n_tokens - tokens, removed)
        alone = rank >= n_merged
        if rest:
            alone.scatter_(1, *_all_but_nearest(x, rank == n_merged, removed + 1, rest + 1))
            n_merged += 1
        return Grouping.of_length(_windows_first(rank, alone, n_merged), tokens, sizes)
    assert threshold is not None  # checked above
    merged = (similarity >= threshold).sum(1)
    if batch == "uniform":
        merged = merged.min().expand_as(merged)
    assignment = _windows_first(rank, rank >= merged[:, None], merged[:, None])
    return Grouping.of_counts(assignment, tokens_in(x, padding) - merged * removed, sizes, padding)


def _windows_first(rank: Tensor, alone: Tensor, n_merged: Tensor | int) -> Tensor:
    """Assignment from the rank of every patch's window, and whether the patch stays alone: (B, N) each."""
    return torch.where(alone, n_merged + alone.cumsum(1) - 1, rank)


def _all_but_nearest(x: Tensor, inside: Tensor, area: int, n_nearest: int) -> tuple[Tensor, Tensor]:
    """The patches of one window per image, and True for those not among the nearest to its mean: (B, area) each.

    inside: (B, N), bool, True for the `area` patches of the window.
    """
    patches = true_positions(inside, area)
    unit = unit_vectors(rows(x, patches))
    nearness = (unit * unit.sum(1, keepdim=True)).sum(-1)
    return patches, ranks(nearness.nan_to_num(nan=LOWEST)) >= n_nearest


def _rank_of_patches(rank: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Rank of the window that every patch lies in: (B, W) -> (B, gh·gw); W for patches in no whole window."""
    (gh, gw), (height, width) = grid, window
    rank = rank.unflatten(1, (gh // height, gw // width))
    spread = rank.repeat_interleave(height, dim=1).repeat_interleave(width, dim=2)
    return F.pad(spread, (0, gw % width, 0, gh % height), value=rank.shape[1] * rank.shape[2]).flatten(1)


def window_similarities(x: Tensor, grid: tuple[int, int], window: tuple[int, int]) -> Tensor:
    """Mean cosine similarity over the pairs of distinct tokens of each whole window, in row-major order.

    The sum over all pairs is the squared length of the sum of the unit vectors, less their own. The result is (B, W),
    float32 (float64 for float64 tokens), -inf where a token is not finite.

    Raises:
        ValueError: a window of one token, or one that does not fit into the grid.
    """
    check_window(window, grid)
    unit = unit_vectors(x)
    total = _window_sums(unit.unflatten(1, tuple(grid)), window)
    own = _window_sums(row_dot(unit, unit).view(-1, *grid, 1), window).squeeze(-1)
    area = window[0] * window[1]
    similarity = (row_dot(total, total) - own) / (area * (area - 1))
    return similarity.clamp(-1, 1).nan_to_num(nan=LOWEST).flatten(1)


def _window_sums(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Sum over every whole window: (B, gh, gw, D) -> (B, gh // height, gw // width, D)."""
    (gh, gw), (height, width) = x.shape[1:3], window
    rows, columns = gh // height, gw // width
    whole = x[:, : rows * height, : columns * width]
    return whole.unflatten(2, (columns, width)).sum(3).unflatten(1, (rows, height)).sum(2)
