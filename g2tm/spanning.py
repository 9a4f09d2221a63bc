"""Which edges of a grid join its patches along the strongest: Borůvka's spanning tree, for a whole batch at once."""

import math

import torch
from torch import Tensor

from g2tm.selection import images_in


def strongest_edges(right: Tensor, down: Tensor, n_components: int) -> tuple[Tensor, Tensor]:
    """As few of the strongest edges as leave `n_components`, none of which closes a circle.

    The first edges of a maximum spanning tree join the same patches as all edges down to the same strength. The
    number of operations depends on the grid alone, and nothing is read back from the device.

    Args:
        right, down: (B, gh, gw-1) and (B, gh-1, gw), int64, place of every edge in its image, the strongest first,
            from 0.
        n_components: from 1 to gh·gw.

    Returns:
        Masks of the edges, shaped as `right` and `down`.
    """
    n_patches = right.shape[1] * down.shape[2]
    place = torch.cat([right.flatten(1), down.flatten(1)], 1)
    edges = torch.arange(place.shape[1], device=place.device).expand_as(place)
    order = torch.empty_like(place).scatter_(1, place, edges)
    in_tree = _spanning_tree(_ends(right, down, order), images_in(right), n_patches).view(order.shape)
    chosen = in_tree * (in_tree.cumsum(1) <= n_patches - n_components)
    chosen = chosen.gather(1, place).bool()
    first, second = chosen.split([right[0].numel(), down[0].numel()], 1)
    return first.view(right.shape), second.view(down.shape)


def _ends(right: Tensor, down: Tensor, order: Tensor) -> Tensor:
    """Both patches of every edge, numbered through the batch: (2, B·K), in the order (B, K) of each image's K edges."""
    n_images, gh, gw = images_in(right), right.shape[1], down.shape[2]
    patch = torch.arange(gh * gw, device=order.device).view(gh, gw)
    first = torch.cat([patch[:, :-1].flatten(), patch[:-1].flatten()])
    second = torch.cat([patch[:, 1:].flatten(), patch[1:].flatten()])
    ends = torch.stack([first, second])[:, order]
    return (ends + gh * gw * torch.arange(n_images, device=order.device)[:, None]).flatten(1)


def _spanning_tree(ends: Tensor, n_images: int, n_patches: int) -> Tensor:
    """Borůvka (1926): every component takes its strongest edge to another one, until one is left.

    Args:
        ends: (2, B·K), both patches of every edge of B connected grids, each grid's edges from the strongest on.
        n_images, n_patches: B, and the patches of one grid.

    Returns:
        (B·K,), int64, 1 for the edges of the trees.
    """
    n_edges, rounds = ends.shape[1], math.ceil(math.log2(n_patches))  # each leaves half of the components at most
    edge = torch.arange(n_edges, device=ends.device)
    patch = labels = torch.arange(n_images * n_patches, device=ends.device)
    taken = torch.zeros(n_edges + 1, dtype=torch.int64, device=ends.device)  # the last stands for none
    for done in range(rounds):
        theirs = labels[ends]
        between = torch.where(theirs[0] == theirs[1], n_edges, edge)
        best = torch.full_like(patch, n_edges).scatter_reduce(0, theirs.flatten(), between.repeat(2), "amin")
        taken = taken.scatter(0, best, 1)
        other = theirs.sum(0)[best.clamp(max=n_edges - 1)] - patch
        parent = torch.where(best < n_edges, other, patch)
        mutual = (parent[parent] == patch) & (patch < parent)  # two took the same edge: the first becomes the root
        parent = torch.where(mutual, patch, parent)
        for _ in range(rounds - done):  # no chain is longer than there are components
            parent = parent[parent]
        labels = parent[labels]
    return taken[:-1]
