"""Agglomerative token clustering (ATC, ECCV 2024): bottom-up clusters, without any notion of place."""

import numpy as np
import torch
from torch import Tensor

from g2tm.reduction import Grouping, one_by_one
from g2tm.selection import batch_and_length, selection
from g2tm.similarity import exact_product, unit_vectors
from g2tm.validation import check_choice, check_tokens

LINKAGES = ("average", "complete", "single")


@one_by_one
@selection
def atc(
    metric: Tensor,
    *,
    clusters: int,
    linkage: str = "average",
    sizes: Tensor | None = None,
    padding: Tensor | None = None,
) -> Grouping:
    """Join the two nearest clusters until so many are left (section 3).

    Clusters are in the order of their first token. The clustering itself is SciPy's, on the CPU, image by image; it
    takes memory of N² numbers.

    Args:
        metric, sizes, padding: see `g2tm`. Sizes weigh in means, not in distances, which are 1 - cosine.
        clusters: how many clusters are left; N if that is fewer.
        linkage: distance of two clusters: "average": the mean over all pairs, "complete": the largest, "single": the
            smallest.
    """
    check_choice("linkage", linkage, LINKAGES)
    n_images, n_tokens = batch_and_length(metric)
    if clusters >= n_tokens or n_images == 0:
        return Grouping.identity(metric, sizes)
    check_tokens(clusters, 1, n_tokens)
    # A token that is not finite is far from all others, as a zero vector is.
    unit = unit_vectors(metric).nan_to_num(0, 0, 0)
    return Grouping.of_length(_agglomerated(1 - exact_product(unit, unit.mT), clusters, linkage), clusters, sizes)


@torch.library.custom_op("g2tm::agglomerate", mutates_args=())
def _agglomerated(distance: Tensor, clusters: int, linkage: str) -> Tensor:
    """(B, N, N) -> (B, N), int64; one operator to a compiler or a trace, which could not look into SciPy."""
    assignment = np.stack([_clusters(own, clusters, linkage) for own in distance.cpu().numpy()])
    return torch.from_numpy(assignment).to(distance.device)


@_agglomerated.register_fake
def _(distance: Tensor, clusters: int, linkage: str) -> Tensor:
    return distance.new_empty(distance.shape[:2], dtype=torch.int64)


def _clusters(distance: np.ndarray, clusters: int, linkage: str) -> np.ndarray:
    """(N, N) distances -> (N,), int64, the cluster of every token.

    The tree is cut by its number of joins: a cut by distance misses the number of clusters where distances tie.
    """
    from scipy.cluster import hierarchy  # here, for `import g2tm` needs no SciPy
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial.distance import squareform

    n_tokens = len(distance)
    tree = hierarchy.linkage(squareform(distance, checks=False), linkage)[: n_tokens - clusters]
    joined = n_tokens + np.arange(len(tree))
    ends = np.concatenate([tree[:, 0], tree[:, 1]]).astype(np.int64)
    edges = coo_array((np.ones(len(ends)), (ends, np.tile(joined, 2))), shape=(n_tokens + len(tree),) * 2)
    labels = connected_components(edges, directed=False)[1][:n_tokens]
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
