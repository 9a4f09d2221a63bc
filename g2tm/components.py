"""Connected components of the 4-neighbour grid, over a whole batch at once.

The grid comes as two masks of surviving edges, never as a list of them: `right`, (B, gh, gw-1), joins a patch to
the next of its row, `down`, (B, gh-1, gw), to the one below.
"""

import math
from importlib.util import find_spec

import cv2
import networkx
import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

HAS_TRITON = find_spec("triton") is not None
# Patches whose labels any GPU holds in the shared memory of one program (8 bytes each while a scan runs).
MAX_ON_CHIP = 64 * 64


@torch.compiler.disable  # what it finds decides on shapes, and compiled search is compiled already
def grid_components(right, down, backend="auto"):
    """Number the connected components of every image.

    Args:
        right, down: (B, gh, gw-1) and (B, gh-1, gw), bool, the edges that survive.
        backend: "opencv" (compiled labelling of an image of the edges) and "scipy" (compiled graph search) work on
            the CPU, wherever the masks are; "triton" (one kernel) on CUDA; "torch" (label propagation) on any
            device; "networkx" is slow, for comparison. "auto": OpenCV on the CPU, Triton on CUDA where it is
            installed and the grid is no larger than 64×64, torch elsewhere.

    Returns:
        assignment: (B, gh·gw), int64, components from 0 in the row-major order of their first patch.
        counts: (B,), int64, components of each image.
        lengths: the counts as B numbers: the one wait for the device.

    Raises:
        ValueError: unknown backend.
    """
    check_backend(backend)
    if backend == "auto":
        backend = _fastest(right, down)
    assignment, counts = BACKENDS[backend](right, down)
    lengths = counts.tolist()
    rounds = propagation_rounds(assignment.shape[1])
    while 0 in lengths:  # of torch's propagation alone, and never seen
        rounds *= 2
        assignment, counts = _torch_components(right, down, rounds)
        lengths = counts.tolist()
    return assignment, counts, lengths


def check_backend(backend):
    """Raise a ValueError for an unknown backend."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {backend!r}: choose auto, {', '.join(BACKENDS)}")


def _fastest(right, down):
    """The backend for masks of this size and device."""
    if right.device.type == "cpu":
        return "opencv"
    fits = right.shape[1] * down.shape[2] <= MAX_ON_CHIP
    return "triton" if right.device.type == "cuda" and HAS_TRITON and fits else "torch"


def _opencv_components(right, down):
    """OpenCV's labelling of a picture with a pixel per patch and per possible edge, the images below each other."""
    device = right.device
    right, down = right.cpu().numpy(), down.cpu().numpy()
    n_images, gh, gw = len(right), right.shape[1], down.shape[2]
    picture = np.zeros((n_images, 2 * gh, 2 * gw), dtype=np.uint8)  # the last row of each image parts it from the next
    picture[:, ::2, ::2] = 1
    picture[:, ::2, 1:-1:2] = right
    picture[:, 1:-1:2, ::2] = down
    labels = cv2.connectedComponents(picture.reshape(-1, 2 * gw), connectivity=4, ltype=cv2.CV_32S)[1]
    labels = labels.reshape(n_images, 2 * gh, 2 * gw)[:, ::2, ::2].reshape(n_images, gh * gw)
    assignment, counts = _first_seen_order(labels)
    return torch.from_numpy(assignment).to(device), torch.from_numpy(counts).to(device)


def _first_seen_order(labels):
    """Number labels from 0 in each image, in the order in which they first appear.

    Args:
        labels: (B, N), integers from 1 without gaps; no two images share one.

    Returns:
        (B, N) and (B,), int64: new labels, and how many there are.
    """
    flat = labels.ravel()
    highest = np.maximum.accumulate(flat)
    if flat[0] != 1 or (highest[1:] - highest[:-1] > 1).any():  # OpenCV promises no order, but keeps to this one
        first = np.empty(highest[-1] + 1, dtype=np.int64)
        first[flat[::-1]] = np.arange(len(flat))[::-1]  # the last assignment wins: the first appearance
        rank = np.empty_like(first)
        rank[np.argsort(first[1:]) + 1] = np.arange(1, len(first))
        flat = rank[flat]
        highest = np.maximum.accumulate(flat)
    ends = highest[labels.shape[1] - 1 :: labels.shape[1]].astype(np.int64)
    counts = np.diff(ends, prepend=0)
    return flat.reshape(labels.shape) - (ends - counts + 1)[:, None], counts


def propagation_rounds(n_patches):
    """Rounds of `_torch_components` that are enough: one more than the worst case found (snakes, spirals, mazes)."""
    return math.ceil(math.log2(max(n_patches, 2)) / 2) + 2


def _torch_components(right, down, rounds=None):
    """Label propagation: hook the larger label of every edge onto the smaller, then shorten the chains of pointers.

    Nothing is read back: a count of 0 says that the image needs more rounds.
    """
    n_images, gh, gw = len(right), right.shape[1], down.shape[2]
    labels = torch.arange(n_images * gh * gw, device=right.device)
    index = labels.view(n_images, gh, gw)
    neighbours = index.repeat(2, 1, 1, 1)  # every patch's right and lower one; itself where there is no edge
    neighbours[0, :, :, :-1] += right
    neighbours[1, :, :-1] += gw * down
    neighbours = neighbours.flatten(1)
    for _ in range(propagation_rounds(gh * gw) if rounds is None else rounds):
        theirs = labels[neighbours]
        low, high = torch.minimum(labels, theirs), torch.maximum(labels, theirs)
        labels = labels.scatter_reduce(0, high.flatten(), low.flatten(), "amin")
        labels = labels[labels]
        labels = labels[labels]
    settled = (labels[neighbours] == labels).view(2, n_images, -1).all(2).all(0)
    assignment, counts = _number_roots(labels.view(n_images, -1))
    return assignment, counts * settled


def _number_roots(roots):
    """Components from 0 in each image, from the first patch of every patch's component.

    Args:
        roots: (B, N), int64, numbered through the whole batch.

    Returns:
        (B, N) and (B,), int64: components, and how many there are.
    """
    is_root = roots == torch.arange(roots.numel(), device=roots.device).view_as(roots)
    rank = is_root.cumsum(1)
    return rank.flatten()[roots] - 1, rank[:, -1]


def _triton_components(right, down):
    from g2tm.triton_components import components  # needs Triton, which is not everywhere

    return components(right, down)


def component_roots(start, end, n_nodes):
    """Root of every node of any graph, on the CPU.

    Args:
        start, end: (E,), int64, the nodes at the two ends of every edge.
        n_nodes: number of nodes.

    Returns:
        (n_nodes,), int64: the smallest index in each node's component.
    """
    ends = start.cpu().numpy(), end.cpu().numpy()
    graph = coo_array((np.ones(len(start), dtype=np.int8), ends), shape=(n_nodes, n_nodes)).tocsr()
    n_components, labels = connected_components(graph, directed=False)
    roots = np.empty(n_components, dtype=np.int64)
    roots[labels[::-1]] = np.arange(n_nodes)[::-1]  # the last assignment wins: the smallest index
    return torch.from_numpy(roots[labels]).to(start.device)


def _networkx_roots(start, end, n_nodes):
    """The oracle: a textbook search in Python."""
    graph = networkx.Graph()
    graph.add_nodes_from(range(n_nodes))
    graph.add_edges_from(zip(start.tolist(), end.tolist(), strict=True))
    roots = torch.empty(n_nodes, dtype=torch.long)
    for component in networkx.connected_components(graph):
        roots[list(component)] = min(component)
    return roots.to(start.device)


def _of_edges(find_roots):
    """A backend of `grid_components` from one that takes a list of edges."""

    def components(right, down):
        shape = len(right), right.shape[1] * down.shape[2]
        index = torch.arange(math.prod(shape), device=right.device).view(-1, right.shape[1], down.shape[2])
        start = torch.cat([index[:, :, :-1][right], index[:, :-1][down]])
        end = torch.cat([index[:, :, 1:][right], index[:, 1:][down]])
        return _number_roots(find_roots(start, end, math.prod(shape)).view(shape))

    return components


BACKENDS = {
    "opencv": _opencv_components,
    "scipy": _of_edges(component_roots),
    "torch": _torch_components,
    "triton": _triton_components,
    "networkx": _of_edges(_networkx_roots),
}
