"""Agglomerative token clustering (ATC, ECCV 2024): bottom-up clusters, without any notion of place."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import Grouping
from g2tm.selection import extent, precise, selection
from g2tm.validation import check_tokens

LINKAGES = ("average", "complete", "single")


@selection
def atc(metric: Tensor, *, clusters: int, linkage: str = "average", sizes: Tensor | None = None) -> Grouping:
    """Join the two nearest clusters until so many are left (section 3).

    The clustering itself is SciPy's, on the CPU, image by image; it takes memory of N² numbers.

    Args:
        metric: (B, N, D), patch tokens; their distance is 1 - cosine.
        clusters: how many clusters are left; N if that is fewer.
        linkage: distance of two clusters: "average": the mean over all pairs, "complete": the largest, "single": the
            smallest.
        sizes: (B, N), patches that each token carries; None: one each. They weigh in means, not in distances.

    Returns:
        A `Grouping`; clusters are in the order of their first token.

    Raises:
        ValueError: an unknown linkage, or no number of clusters.
    """
    if linkage not in LINKAGES:
        raise ValueError(f"linkage {linkage!r}: choose {', '.join(LINKAGES)}")
    n_images, n_tokens = extent(metric)
    if clusters >= n_tokens or n_images == 0:
        return Grouping.identity(metric, sizes)
    check_tokens(clusters, 1, n_tokens)
    # A token that is not finite is far from all others, as a zero vector is.
    unit = F.normalize(precise(metric), dim=-1).nan_to_num(0, 0, 0)
    distance = (1 - unit @ unit.mT).cpu().numpy()
    assignment = np.stack([_clusters(own, clusters, linkage) for own in distance])
    return Grouping.of_length(torch.from_numpy(assignment).to(metric.device), clusters, sizes)


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
