"""Expedit (NeurIPS 2022, arXiv 2210.01035): tokens become a small grid of clusters, and come back as mixes of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from g2tm.reduction import Reduction, equal_counts
from g2tm.selection import at_least_float32, cached, images_in, selection, without_autocast
from g2tm.similarity import LOWEST, exact_product
from g2tm.soft import check_mix, mix, nearest_weights
from g2tm.validation import budget, check_grid

LEAST = 1e-16  # floor of what a cluster counts

Grid = tuple[int, int]


def expedit(
    x: Tensor,
    grid: Grid,
    *,
    clusters: Grid,
    iterations: int = 5,
    window: int = 5,
    temperature: float = 0.02,
    k: int = 20,
    restore_temperature: float | None = None,
    weighting: str = "euclidean",
) -> "SoftClusters":
    """Cluster tokens by local soft k-means (section 3.2), and restore them from their nearest clusters (section 3.3).

    Args:
        x, grid: see `g2tm`.
        clusters: (h, w), at most the grid.
        iterations: rounds of k-means; 0: the tokens are pooled.
        window: odd; a token may join the clusters in so many rows and columns around its own cell.
        temperature: the factor of squared distances in the clustering; larger is sharper.
        k, weighting: see `nearest_weights`.
        restore_temperature: the factor in the reconstruction; None: as in the clustering.
    """
    check_grid(grid, x.shape[1])
    check_clusters(clusters, grid)
    check_clustering(iterations, window)
    around = neighborhood(grid, clusters, window, x.device)
    shares = cluster(x, around, iterations, temperature) if iterations else None
    restore_temperature = temperature if restore_temperature is None else restore_temperature
    return SoftClusters(x, around, shares, k, restore_temperature, weighting)


def check_clusters(clusters: Grid, grid: Grid) -> None:
    """Raise a ValueError for a grid of clusters that is empty, or larger than that of the patches."""
    if not all(1 <= own <= side for own, side in zip(clusters, grid, strict=True)):
        raise ValueError(
            f"clusters {clusters[0]}×{clusters[1]}: give rows and columns from 1×1 to the grid's {grid[0]}×{grid[1]}"
        )


def check_clustering(iterations: int, window: int) -> None:
    """Raise a ValueError for a number of rounds or a window that is not allowed."""
    if iterations < 0:
        raise ValueError(f"iterations {iterations}: give a number of rounds, 0 or more")
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window {window}: give an odd number of clusters, such as 5")


def cluster_grid(tokens: int | float, grid: Grid) -> Grid:
    """The grid of clusters, of about the shape of the grid, that a budget allows; tokens: see `g2tm.budget`."""
    gh, gw = grid
    wanted = budget(tokens, gh * gw)
    h = min(max(1, round((wanted * gh / gw) ** 0.5)), gh)
    return h, min(max(1, wanted // h), gw)


class Neighborhood(NamedTuple):
    """The clusters that a token may join. Those of a row of tokens lie in R rows of clusters.

    Attributes:
        grid, clusters: (gh, gw) and (h, w).
        members: (gh, R·w), int64, the clusters that a row of tokens meets; some rows of clusters may be repeated.
        near: (gh, gw, R·w), bool, True for those in the window of a token; never for what is repeated.
    """

    grid: Grid
    clusters: Grid
    members: Tensor
    near: Tensor


def neighborhood(grid: Grid, clusters: Grid, window: int, device: torch.device) -> Neighborhood:
    """The clusters that every token may join, by position alone; the arguments are those of `expedit`."""
    (h, w), half = clusters, window // 2
    row, column = (cells(side, own, device) for side, own in zip(grid, clusters, strict=True))
    reach = min(half, h - 1)
    met = row[:, None] + torch.arange(-reach, reach + 1, device=device)
    exists, met = (met >= 0) & (met < h), met.clamp(0, h - 1)
    columns = torch.arange(w, device=device)
    close = (column[:, None] - columns).abs() <= half
    near = exists[:, None, :, None] & close[None, :, None]
    members = (met.unsqueeze(2) * w + columns).flatten(1)
    return Neighborhood(grid, clusters, members, near.flatten(2))


def cells(side: int, clusters: int, device: torch.device) -> Tensor:
    """The cell of every place of a side, (side,), int64, as nearest-neighbor resizing in float32 finds it."""
    place = torch.arange(side, device=device, dtype=torch.float32)
    return (place * (clusters / side)).long().clamp(max=clusters - 1)


@selection
def cluster(x: Tensor, around: Neighborhood, iterations: int, temperature: float) -> Tensor:
    """Local soft k-means: x: (B, N, D) -> (B, gh, gw, R·w), the shares of tokens in clusters after the last round."""
    values = at_least_float32(x)
    centers, shares = pooled(values, around), values
    for turn in range(iterations):
        if turn:
            centers = _weighted_mean(values, shares, around)
        met = centers[:, around.members]
        nearness = 2 * exact_product(values.unflatten(1, around.grid), met.transpose(2, 3))
        nearness = nearness - centers.square().sum(-1)[:, around.members].unsqueeze(2)
        shares = (temperature * nearness).masked_fill(~around.near, LOWEST).softmax(-1)
    return shares


def pooled(x: Tensor, around: Neighborhood) -> Tensor:
    """Adaptive average pooling: (B, gh·gw, D) -> (B, h·w, D), as two products, which every exporter knows."""
    rows, columns = (_pooling(own, side, x) for own, side in zip(around.clusters, around.grid, strict=True))
    narrow = exact_product(columns, x.unflatten(1, around.grid))
    return exact_product(rows, narrow.flatten(2)).unflatten(2, narrow.shape[2:]).flatten(1, 2)


def _pooling(clusters: int, side: int, like: Tensor) -> Tensor:
    """(clusters, side), the weights of the places of a side in their means."""
    place, number = torch.arange(side, device=like.device), torch.arange(clusters, device=like.device)[:, None]
    first = (number * side).div(clusters, rounding_mode="floor")
    last = ((number + 1) * side + clusters - 1).div(clusters, rounding_mode="floor")
    inside = ((place >= first) & (place < last)).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)


def _weighted_mean(x: Tensor, shares: Tensor, around: Neighborhood) -> Tensor:
    """Mean of the tokens by their shares: (B, N, D) -> (B, M, D)."""
    sums = _add_up(exact_product(shares.transpose(2, 3), x.unflatten(1, around.grid)), around)
    return sums / _add_up(shares.sum(2).unsqueeze(-1), around).clamp(min=LEAST)


def _add_up(parts: Tensor, around: Neighborhood) -> Tensor:
    """Add up what the rows of tokens give to clusters: (B, gh, R·w, D) -> (B, M, D)."""
    n_images, width = images_in(parts), parts.shape[3]
    index = around.members.flatten()[None, :, None].expand(n_images, -1, width)
    h, w = around.clusters
    return parts.new_zeros(n_images, h * w, width).scatter_add(1, index, parts.flatten(1, 2))


class SoftClusters(Reduction):
    """Reduction to soft clusters on a grid; `merge` takes means by the shares of the last round.

    No token is a group of patches, so there is no assignment; `nearest` may stand for it in pictures. The size of a
    token is the sum of the shares in it.

    Args:
        x: (B, N, D), the tokens.
        around: see `neighborhood`.
        shares: (B, gh, gw, R·w), without gradients, see `cluster`; None: the tokens are pooled.
        k, temperature, weighting: of the way back, see `nearest_weights`.
    """

    def __init__(
        self, x: Tensor, around: Neighborhood, shares: Tensor | None, k: int, temperature: float, weighting: str
    ) -> None:
        check_mix(k, weighting)
        self._x, self._k, self._temperature, self._weighting = x, k, temperature, weighting
        self.grid, self._around, self._shares = around.clusters, around, shares
        self.counts, self.lengths = equal_counts(x, around.clusters[0] * around.clusters[1])

    @cached
    def sizes(self) -> Tensor:
        if self._shares is None:
            per_token = self._x.shape[1] / self.width
            return self.counts.new_full((images_in(self.counts), self.width), per_token, dtype=torch.float32)
        return _add_up(self._shares.sum(2).unsqueeze(-1), self._around).squeeze(-1).float()

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, M, D), in the dtype of x; linear and differentiable in x."""
        values = at_least_float32(x)
        with without_autocast(x):
            if self._shares is None:
                return pooled(values, self._around).to(x.dtype)
            return _weighted_mean(values, self._shares.to(values.dtype), self._around).to(x.dtype)

    @cached
    def mixture(self) -> tuple[Tensor, Tensor]:
        """Positions and weights of the nearest clusters, (B, N, k) each, as they were right after the clustering."""
        centers = self.merge(self._x)
        return nearest_weights(self._x, centers, k=self._k, temperature=self._temperature, weighting=self._weighting)

    @property
    def nearest(self) -> Tensor:
        """(B, N), int64, for every token the nearest cluster."""
        return self.mixture[0][..., 0]

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """y: (B, M, D) -> (B, N, D); linear in y, and `scores` makes no difference."""
        return mix(y, *self.mixture)
