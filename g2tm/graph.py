"""Graph-guided token merging (G2TM): connected components of similar neighbouring patches become one token."""

import torch
import torch.nn.functional as F

from g2tm.components import component_roots, spanning_forest
from g2tm.reduction import Reduction
from g2tm.selection import selection
from g2tm.validation import check_batch, check_grid, check_threshold


@selection
def edge_similarities(x, grid):
    """Cosine similarity of neighbouring patches.

    Args:
        x: (B, gh·gw, D), patch tokens in row-major order.
        grid: (gh, gw).

    Returns:
        (right, down): (B, gh, gw-1) and (B, gh-1, gw), float32 (float64 for float64 tokens), from -1 to 1.
    """
    x = x if x.dtype == torch.float64 else x.float()
    x = F.normalize(x, dim=-1).unflatten(1, tuple(grid))
    right = torch.linalg.vecdot(x[:, :, :-1], x[:, :, 1:])
    down = torch.linalg.vecdot(x[:, :-1], x[:, 1:])
    return right.clamp(-1, 1), down.clamp(-1, 1)


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
        backend: how components are found, see `g2tm.components.component_roots`.

    Returns:
        A `Reduction`; groups are in the row-major order of their first patch.

    Raises:
        ValueError: a threshold, grid, batch mode or backend that is not allowed.
    """
    check_threshold(threshold)
    check_grid(grid, x.shape[1])
    check_batch(batch)
    shape = x.shape[:2]
    similarity = torch.cat([s.flatten() for s in edge_similarities(x, grid)])
    start, end = _edge_ends(len(x), grid, x.device)
    kept = similarity > threshold
    start, end, similarity = start[kept], end[kept], similarity[kept]
    reduction = _from_roots(component_roots(start, end, shape.numel(), backend), shape, sizes)
    if batch == "ragged" or not reduction.padded:
        return reduction
    n_merges = shape[1] - reduction.sizes.shape[1]
    strongest = _strongest_edges(start, end, similarity, shape, n_merges)
    return _from_roots(component_roots(start[strongest], end[strongest], shape.numel(), backend), shape, sizes)


def _edge_ends(n_images, grid, device):
    """Patches at the two ends of every edge of the grid, in the order of `edge_similarities`.

    Returns:
        Two (E,), int64; patches are numbered through the whole batch.
    """
    gh, gw = grid
    index = torch.arange(n_images * gh * gw, device=device).view(n_images, gh, gw)
    start = torch.cat([index[:, :, :-1].flatten(), index[:, :-1].flatten()])
    end = torch.cat([index[:, :, 1:].flatten(), index[:, 1:].flatten()])
    return start, end


def _from_roots(roots, shape, sizes):
    """Number the components of each image from 0, in the order of their roots.

    Args:
        roots: (B·N,), the first patch of each patch's component.
        shape: (B, N).
        sizes: (B, N) or None.
    """
    is_root = roots == torch.arange(len(roots), device=roots.device)
    rank = is_root.view(shape).cumsum(1)
    counts = rank[:, -1]
    assignment = (rank.flatten() - 1)[roots].view(shape)
    return Reduction.of_counts(assignment, counts, sizes)


def _strongest_edges(start, end, similarity, shape, n_merges):
    """The `n_merges` most similar edges of each image that join two components, as indices into the edges."""
    forest = spanning_forest(start, end, similarity, shape.numel())
    image = start[forest] // shape[1]
    order = torch.argsort(image, stable=True)  # by image, still by falling similarity within each
    n_edges = torch.bincount(image, minlength=shape[0])
    place = torch.arange(len(order), device=order.device) - (n_edges.cumsum(0) - n_edges)[image[order]]
    return forest[order[place < n_merges]]
