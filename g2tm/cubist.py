"""CubistMerge (arXiv 2509.21764): every row loses as many tokens, then every column, so that a rectangle is left."""

from collections.abc import Sequence
from numbers import Integral

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import Grouping, Reduction
from g2tm.selection import at_least_float32, ranks, rows, selection
from g2tm.similarity import LOWEST, unit_vectors
from g2tm.validation import budget, check_choice, check_grid

VALUES = ("entry", "mean", "token")
ROW, COLUMN = 2, 1  # the axis of (B, gh, gw, ...) along which a line runs

Grid = tuple[int, int]


def cubist(
    x: Tensor, grid: Grid, *, remove: Sequence[int | float], value: str = "entry", sizes: Tensor | None = None
) -> Reduction:
    """Remove tokens from every row, then from every column of what is left; at most half of each.

    Tokens at odd positions of a line join their more similar neighbor, the most similar ones first; equal ones by
    position. In the published code one of two tokens that join the same one is lost; here, as in the paper, all count.

    Args:
        x, grid, sizes: see `g2tm`.
        remove: (r_h, r_w), rows and columns that are to go, or shares of them.
        value: of a group: "entry": in every channel the entry of largest magnitude; "mean": by sizes; "token": the
            token of largest norm.
    """
    check_grid(grid, x.shape[1])
    check_choice("value", value, VALUES)
    r_h, r_w = (min(r, side // 2) for r, side in zip(removed(remove, grid), grid, strict=True))
    first = _lines(x, grid, r_w, ROW, value, sizes)
    if not r_h:
        return first
    grid, sizes = (grid[0], grid[1] - r_w), first.sizes if r_w else sizes
    second = _lines(first.merge(x.detach()) if r_w else x, grid, r_h, COLUMN, value, sizes)
    return first.then(second) if r_w else second


def removed(remove: Sequence[int | float], grid: Grid) -> Grid:
    """Rows and columns that go; a share of a side is rounded in float32, half to even.

    Raises:
        ValueError: neither two counts nor two shares.
    """
    if len(remove) != 2 or any(r < 0 or (not isinstance(r, Integral) and r > 1) for r in remove):
        raise ValueError(f"remove {list(remove)}: give numbers of rows and columns, or shares of them from 0 to 1")
    r_h, r_w = (
        int(r) if isinstance(r, Integral) else round(float(np.float32(r) * np.float32(side)))
        for r, side in zip(remove, grid, strict=True)
    )
    return r_h, r_w


def rectangle(tokens: int | float, grid: Grid) -> Grid:
    """The rectangle that a budget allows, both sides kept by shares as equal as possible.

    Of the rectangles to which neither a row nor a column could be added.

    Args:
        tokens: see `g2tm.budget`.
        grid: (gh, gw).

    Raises:
        ValueError: the budget is below a quarter, which one merge cannot leave.
    """
    (gh, gw), wanted = grid, budget(tokens, grid[0] * grid[1])
    least_h, least_w = gh - gh // 2, gw - gw // 2
    if wanted < least_h * least_w:
        raise ValueError(f"tokens {tokens}: one merge keeps at least {least_h}×{least_w} of {gh}×{gw} patches")
    heights = range(least_h, min(gh, wanted // least_w) + 1)
    fits = [(h, min(gw, wanted // h)) for h in heights]
    return min(fits, key=lambda fit: (abs(fit[0] / gh - fit[1] / gw), -fit[0] * fit[1]))


def _lines(x: Tensor, grid: Grid, r: int, axis: int, value: str, sizes: Tensor | None) -> Reduction:
    """Remove r tokens from every line along one axis; x: (B, gh·gw, D)."""
    if r == 0:
        step = Grouping.identity(x, sizes)
        step.grid = grid
        return step
    targets, survivors = _matched(x, grid, r, axis)
    reduced = (grid[0] - r, grid[1]) if axis == COLUMN else (grid[0], grid[1] - r)
    return Lines(x, grid, reduced, targets, survivors, value, sizes)


@selection
def _matched(x: Tensor, grid: Grid, r: int, axis: int) -> tuple[Tensor, Tensor]:
    """Choose the tokens of every line that leave, and where they go (section 3).

    Returns:
        (targets, survivors): (B, gh·gw) and (B, M), int64: the position of the token that takes each in, itself where
        it stays; and the positions of those that stay, in row-major order.
    """
    lines = unit_vectors(x).unflatten(1, grid).movedim(axis, -2)  # (B, lines, t, D)
    places = torch.arange(x.shape[1], device=x.device).view(grid).movedim(axis - 1, -1)  # (lines, t)
    length, stride = lines.shape[-2], 1 if axis == ROW else grid[1]
    similarity = (lines[..., :-1, :] * lines[..., 1:, :]).sum(-1)
    left, right = similarity[..., ::2], F.pad(similarity[..., 1::2], (0, length % 2 == 0), value=LOWEST)
    leaves = ranks(torch.maximum(left, right).flatten(0, 1)).unflatten(0, left.shape[:2]) < r
    move = torch.where(left >= right, -stride, stride) * leaves  # of the tokens at odd positions
    moves = F.pad(torch.stack([torch.zeros_like(move), move], -1).flatten(-2), (0, length % 2))
    order = (moves != 0).long().argsort(dim=-1, stable=True)[..., : length - r]
    survivors = places.expand_as(moves).gather(-1, order)
    targets, survivors = (found.movedim(-1, axis).flatten(1) for found in (places + moves, survivors))
    return targets, survivors


class Lines(Grouping):
    """One step of `cubist`, along rows or columns.

    Args:
        x: (B, N, D), for the number of images.
        grid, reduced: before and after it.
        targets, survivors: see `_matched`.
        value, sizes: see `cubist`.
    """

    def __init__(
        self, x: Tensor, grid: Grid, reduced: Grid, targets: Tensor, survivors: Tensor, value: str, sizes: Tensor | None
    ) -> None:
        counted = Grouping.of_targets(targets, survivors, sizes)
        super().__init__(counted.assignment, counted.counts, counted.lengths, sizes)
        stride = 1 if reduced[1] < grid[1] else grid[1]
        self.grid, self._value, self._survivors = reduced, value, survivors
        self._members = [self._joined(targets, survivors, side) for side in (-stride, stride)]

    @staticmethod
    def _joined(targets: Tensor, survivors: Tensor, side: int) -> Tensor:
        """The neighbor at one side of every token that stays, if it joins it, else the token itself: (B, M)."""
        neighbor = (survivors + side).clamp(0, targets.shape[1] - 1)
        return torch.where(targets.gather(1, neighbor) == survivors, neighbor, survivors)

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, M, D), in the dtype of x; gradients reach the entries that were chosen."""
        if self._value == "mean":
            return super().merge(x)
        merged = rows(x, self._survivors)
        for members in self._members:
            other = rows(x, members)
            merged = torch.where(self._strength(other) > self._strength(merged), other, merged)
        return merged

    def _strength(self, x: Tensor) -> Tensor:
        """The number by which entries compete, or whole tokens."""
        return x.abs() if self._value == "entry" else at_least_float32(x).square().sum(-1, keepdim=True)
