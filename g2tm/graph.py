"""Graph-guided token merging (G2TM): connected components of similar neighbouring patches become one token."""

import math

import torch

from g2tm.components import HAS_TRITON, grid_components
from g2tm.reduction import Reduction
from g2tm.selection import products, selection, square_sums
from g2tm.validation import check_batch, check_grid, check_threshold

EPS = 1e-12  # of `torch.nn.functional.normalize`: smallest norm that a token is divided by


@selection
def edge_similarities(x, grid):
    """Cosine similarity of neighbouring patches.

    Args:
        x: (B, gh·gw, D), patch tokens in row-major order.
        grid: (gh, gw).

    Returns:
        (right, down): (B, gh, gw-1) and (B, gh-1, gw), float32 (float64 for float64 tokens), from -1 to 1.
    """
    grid = tuple(grid)
    if x.device.type == "cuda" and x.dtype != torch.float64 and HAS_TRITON:
        from g2tm.triton_components import edge_similarities as in_one_launch

        return in_one_launch(x, grid, EPS)
    x = (x if x.dtype == torch.float64 else x.float()).unflatten(1, grid)
    norm = square_sums(x).sqrt_().clamp_(min=EPS)
    right = products(x[:, :, :-1], x[:, :, 1:]).div_(norm[:, :, :-1]).div_(norm[:, :, 1:])
    down = products(x[:, :-1], x[:, 1:]).div_(norm[:, :-1]).div_(norm[:, 1:])
    return right.clamp_(-1, 1), down.clamp_(-1, 1)


@selection
def graph_merge(x, grid, threshold, *, sizes=None, batch="ragged", backend="auto"):
    """Merge every connected component of similar neighbours into one token (G2TM).

    Patches are the nodes of the 4-neighbour grid; an edge survives if the cosine similarity of its ends
    exceeds the threshold.

    Args:
        x: (B, N, D), patch tokens in row-major order.
        grid: (gh, gw) with gh·gw = N.
        threshold: cosine similarity in [-1, 1].
        sizes: (B, N), patches that each token carries already; None: one each.
        batch: "ragged": every image keeps its own number of tokens. "uniform": every image keeps as many as the
            image that merges least; the others merge along their most similar edges only.
        backend: how components are found, see `g2tm.components.grid_components`.

    Returns:
        A `Reduction`; groups are in the row-major order of their first patch.

    Raises:
        ValueError: a threshold, grid, batch mode or backend that is not allowed.
    """
    check_threshold(threshold)
    check_grid(grid, x.shape[1])
    check_batch(batch)
    similarity = edge_similarities(x, grid)
    right, down = (edges > threshold for edges in similarity)
    assignment, counts, lengths = grid_components(right, down, backend)
    if batch == "uniform" and min(lengths) < max(lengths):
        right, down = _strongest_edges(similarity, (right, down), x.shape[1] - max(lengths), counts, backend)
        assignment, counts, lengths = grid_components(right, down, backend)
    return Reduction(assignment, counts, lengths, sizes)


def _strongest_edges(similarity, kept, n_merges, counts, backend):
    """The `n_merges` most similar edges of each image that join two components: the head of its maximum spanning
    forest. Of equal edges the earlier is taken, `right` before `down`.

    Borůvka: every component takes its most similar edge to another one, and so on until none is left, which are
    at most log2(N) rounds.

    Args:
        similarity, kept: (right, down), (B, gh, gw-1) and (B, gh-1, gw): how similar, and whether above the threshold.
        n_merges: fewer than the edges of any image's forest that has more, at most those of any other.
        counts: (B,), components of the kept edges.

    Returns:
        (right, down), bool.
    """
    shape = similarity[0].shape[1:], similarity[1].shape[1:]
    kept, similarity = (torch.cat([part.flatten(1) for part in pair], 1) for pair in (kept, similarity))
    order = similarity.masked_fill(~kept, -math.inf).argsort(dim=1, descending=True, stable=True)
    n_edges = order.shape[1]
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n_edges, device=order.device).expand_as(order))
    start, end = _edge_ends(shape[0][0], shape[1][1], order.device)
    chosen = torch.zeros_like(kept)
    component = torch.arange(shape[0][0] * shape[1][1], device=order.device).expand(len(order), -1)
    found = None
    while found is None or not torch.equal(found, counts):
        one, other = component[:, start], component[:, end]
        cost = rank.masked_fill(~kept | (one == other), n_edges)
        cheapest = torch.full_like(component, n_edges)
        cheapest.scatter_reduce_(1, one, cost, "amin").scatter_reduce_(1, other, cost, "amin")
        chosen |= (cost < n_edges) & ((cheapest.gather(1, one) == rank) | (cheapest.gather(1, other) == rank))
        component, found, _ = grid_components(*_split(chosen, shape), backend)
    cost = rank.masked_fill(~chosen, n_edges)
    return _split(cost < cost.sort(dim=1).values[:, n_merges, None], shape)


def _edge_ends(gh, gw, device):
    """Patches at the two ends of every edge: two (E,), int64, those of `right` before those of `down`."""
    index = torch.arange(gh * gw, device=device).view(gh, gw)
    start = torch.cat([index[:, :-1].flatten(), index[:-1].flatten()])
    end = torch.cat([index[:, 1:].flatten(), index[1:].flatten()])
    return start, end


def _split(edges, shape):
    """(B, E) -> (right, down)."""
    right, down = edges.split([math.prod(side) for side in shape], dim=1)
    return right.unflatten(1, shape[0]), down.unflatten(1, shape[1])
