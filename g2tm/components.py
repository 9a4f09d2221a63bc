"""Connected components of the 4-neighbor grid, over a whole batch at once.

The grid comes as two masks of surviving edges, never as a list of them: `right`, (B, gh, gw-1), joins a patch to
the next of its row, `down`, (B, gh-1, gw), to the one below.
"""

import math
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from g2tm.selection import images_in, numpy_helps, ranks
from g2tm.spanning import strongest_edges

HAS_TRITON = find_spec("triton") is not None
# Patches whose labels any GPU holds in the shared memory of one program (8 bytes each while a scan runs).
MAX_ON_CHIP = 64 * 64


def grid_components(right: Tensor, down: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor, list[int]]:
    """Number the connected components of every image.

    Args:
        right, down: (B, gh, gw-1) and (B, gh-1, gw), bool, the edges that survive.
        backend: "opencv" (compiled labelling of an image of the edges) works on the CPU, wherever the masks are;
            "triton" (one kernel) on CUDA; "torch" (label propagation) on any device; "networkx" is slow, for
            comparison. "auto": OpenCV on the CPU, Triton on CUDA where it is installed and the grid is no larger
            than 64×64, torch elsewhere.

    Returns:
        assignment: (B, gh·gw), int64, components from 0 in the row-major order of their first patch.
        counts: (B,), int64, components of each image.
        lengths: the counts as B numbers: the one wait for the device.

    Raises:
        ValueError: unknown backend.
    """
    n_images, n_patches = images_in(right), right.shape[1] * down.shape[2]
    backend = _chosen(backend, right, down)
    if n_images == 0:
        empty = torch.zeros(0, n_patches, dtype=torch.int64, device=right.device)
        return empty, empty.new_zeros(0), []
    assignment, counts = BACKENDS[backend](right, down)
    lengths = counts.tolist()
    rounds = propagation_rounds(n_patches)
    while 0 in lengths:  # of torch's propagation alone, and never seen
        rounds *= 2
        assignment, counts = propagated_components(right, down, rounds)
        lengths = counts.tolist()
    return assignment, counts, lengths


def strongest_components(right: Tensor, down: Tensor, n_components: int, backend: str = "auto") -> Tensor:
    """Components along the strongest edges of every image: as few edges as leave `n_components`.

    An edge lowers the number of components by one at most, so every number is reached. How many edges that takes
    is found for all images at once: by bisection, or with torch, where a labelling is many operations, from a spanning
    tree. Nothing is read back from the device.

    Args:
        right, down: (B, gh, gw-1) and (B, gh-1, gw), strength of every edge, which the strongest survive; of equal
            ones the first in row-major order, those of `right` before those of `down`; NaN is the weakest.
        n_components: from 1 to gh·gw.
        backend: see `grid_components`.

    Returns:
        (B, gh·gw), int64, components from 0 in the row-major order of their first patch.

    Raises:
        ValueError: unknown backend.
    """
    backend = _chosen(backend, right, down)
    low, high = int(right.shape[1] * down.shape[2] - n_components), int(right[0].numel() + down[0].numel())
    right, down = _places(right, down)
    if backend == "torch":
        return propagated_components(*strongest_edges(right, down, n_components))[0]
    if backend != "opencv":
        return _bisect(BACKENDS[backend], right, down, n_components, low, high)
    found = _bisect(_opencv_labels, right.cpu().numpy(), down.cpu().numpy(), n_components, low, high)
    return torch.from_numpy(found).to(right.device)


def _bisect(label: Callable, right: Any, down: Any, n_components: int, low: Any, high: Any) -> Any:
    """The components that `label` finds along so many of the first edges that there are `n_components`.

    Args:
        label: from (right, down), bool, to (assignment, counts); of tensors or of NumPy arrays.
        right, down: place of every edge; of the same kind.
        low, high: bounds of the number of edges.
    """
    for _ in range((high - low).bit_length() + 1):
        middle = (low + high) // 2
        assignment, counts = label(right < middle, down < middle)
        over = counts.reshape(-1, 1, 1) - n_components  # at least so many edges are missing, or too many
        if isinstance(over, np.ndarray) and not over.any():  # of a tensor it would have to be read back
            break
        low = low + (over > 0) * (middle + over - low)
        high = high + (over <= 0) * (middle + over - high)
    return assignment


def check_backend(backend: str, device: torch.device) -> None:
    """Raise a ValueError for an unknown backend, or for one that does not run on this device."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {backend!r}: choose auto, {', '.join(BACKENDS)}")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own way to run kernels anywhere
    if backend == "triton" and device.type != "cuda" and not interpreted:
        raise ValueError(f"backend 'triton' runs on CUDA, the tokens are on {device}: choose 'torch' or 'auto'")


def _chosen(backend: str, right: Tensor, down: Tensor) -> str:
    """The backend, for "auto" the fastest for edges of this size and device."""
    check_backend(backend, right.device)
    if backend != "auto":
        return backend
    if numpy_helps(right):
        return "opencv"
    fits = right.shape[1] * down.shape[2] <= MAX_ON_CHIP
    return "triton" if right.device.type == "cuda" and HAS_TRITON and fits else "torch"


def _places(right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Place of every edge among those of its image, the strongest first, from 0: int64, shaped as the edges."""
    strength = torch.cat([right.flatten(1), down.flatten(1)], 1)
    first, second = ranks(strength.nan_to_num(nan=-math.inf)).split([right[0].numel(), down[0].numel()], 1)
    return first.view(right.shape), second.view(down.shape)


def _opencv_components(right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    assignment, counts = _opencv_labels(right.cpu().numpy(), down.cpu().numpy())
    return torch.from_numpy(assignment).to(right.device), torch.from_numpy(counts).to(right.device)


def _opencv_labels(right: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """OpenCV's labelling of a picture with a pixel per patch and per possible edge, the images below each other."""
    import cv2

    n_images, gh, gw = len(right), right.shape[1], down.shape[2]
    picture = np.zeros((n_images, 2 * gh, 2 * gw), dtype=np.uint8)  # the last row of each image parts it from the next
    picture[:, ::2, ::2] = 1
    picture[:, ::2, 1:-1:2] = right
    picture[:, 1:-1:2, ::2] = down
    labels = cv2.connectedComponents(picture.reshape(-1, 2 * gw), connectivity=4, ltype=cv2.CV_32S)[1]
    labels = labels.reshape(n_images, 2 * gh, 2 * gw)[:, ::2, ::2].reshape(n_images, gh * gw)
    return _first_seen_order(labels)


def _first_seen_order(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def propagation_rounds(n_patches: int) -> int:
    """Rounds of `propagated_components` that are enough: one more than the worst found (snakes, spirals, mazes)."""
    return math.ceil(math.log2(max(n_patches, 2)) / 2) + 2


def propagated_components(right: Tensor, down: Tensor, rounds: int | None = None) -> tuple[Tensor, Tensor]:
    """Label propagation: hook the larger label of every edge onto the smaller, then shorten the chains of pointers.

    Nothing is read back: a count of 0 says that the image needs more rounds.

    Args:
        right, down: see `grid_components`.
        rounds: of propagation; None: `propagation_rounds`.

    Returns:
        assignment, counts: see `grid_components`.
    """
    n_images, gh, gw = images_in(right), right.shape[1], down.shape[2]
    labels = torch.arange(n_images * gh * gw, device=right.device)
    index = labels.view(n_images, gh, gw)
    neighbors = index.repeat(2, 1, 1, 1)  # every patch's right and lower one; itself where there is no edge
    neighbors[0, :, :, :-1] += right
    neighbors[1, :, :-1] += gw * down
    neighbors = neighbors.flatten(1)
    for _ in range(propagation_rounds(gh * gw) if rounds is None else rounds):
        theirs = labels[neighbors]
        low, high = torch.minimum(labels, theirs), torch.maximum(labels, theirs)
        labels = labels.scatter_reduce(0, high.flatten(), low.flatten(), "amin")
        labels = labels[labels]
        labels = labels[labels]
    settled = (labels[neighbors] == labels).view(2, n_images, -1).all(2).all(0)
    assignment, counts = _number_roots(labels.view(n_images, -1))
    return assignment, counts * settled


def _number_roots(roots: Tensor) -> tuple[Tensor, Tensor]:
    """Components from 0 in each image, from the first patch of every patch's component.

    Args:
        roots: (B, N), int64, numbered through the whole batch.

    Returns:
        (B, N) and (B,), int64: components, and how many there are.
    """
    is_root = roots == torch.arange(roots.numel(), device=roots.device).view_as(roots)
    rank = is_root.cumsum(1)
    return rank.flatten()[roots] - 1, rank[:, -1]


def _triton_components(right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    from g2tm.triton_components import components  # needs Triton, which is not everywhere

    return components(right, down)


def _networkx_components(right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The oracle: a textbook search in Python."""
    import networkx

    index = torch.arange(len(right) * right.shape[1] * down.shape[2]).view(len(right), right.shape[1], down.shape[2])
    right_of, below = right.cpu(), down.cpu()
    graph = networkx.Graph()
    graph.add_nodes_from(range(index.numel()))
    graph.add_edges_from(zip(index[:, :, :-1][right_of].tolist(), index[:, :, 1:][right_of].tolist(), strict=True))
    graph.add_edges_from(zip(index[:, :-1][below].tolist(), index[:, 1:][below].tolist(), strict=True))
    roots = torch.empty(index.numel(), dtype=torch.long)
    for component in networkx.connected_components(graph):
        roots[list(component)] = min(component)
    return _number_roots(roots.view(len(right), -1).to(right.device))


BACKENDS = {
    "opencv": _opencv_components,
    "torch": propagated_components,
    "triton": _triton_components,
    "networkx": _networkx_components,
}
