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
import torch.nn.functional as F
from torch import Tensor

from g2tm.selection import images_in, inverse, numpy_helps, ranks
from g2tm.validation import check_choice

HAS_TRITON = find_spec("triton") is not None
# Patches whose labels any GPU holds in the shared memory of one program (8 bytes each while a scan runs); Triton pads
# both sides of the grid to powers of two.
MAX_ON_CHIP = 64 * 64


def grid_components(right: Tensor, down: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor, list[int]]:
    """Number the connected components of every image.

    Args:
        right, down: bool, the edges that survive.
        backend: "opencv" (compiled labelling of an image of the edges) works on the CPU, wherever the masks are;
            "triton" (one kernel) on CUDA; "torch" (label propagation) on any device. "auto": OpenCV on the CPU,
            Triton on CUDA where it is installed and the grid fits (`MAX_ON_CHIP`), torch elsewhere.

    Returns:
        assignment: (B, gh·gw), int64, components from 0 in the row-major order of their first patch.
        counts: (B,), int64, components of each image.
        lengths: the counts as B numbers: the one wait for the device.
    """
    backend, n_patches = _chosen(backend, right, down), right.shape[1] * down.shape[2]
    if images_in(right) == 0:
        empty = torch.zeros(0, n_patches, dtype=torch.int64, device=right.device)
        return empty, empty.new_zeros(0), []
    assignment, counts = BACKENDS[backend](right, down)
    rounds = propagation_rounds(n_patches)
    while 0 in (lengths := counts.tolist()):  # of torch's propagation alone, and never seen
        rounds *= 2
        assignment, counts = propagated_components(right, down, rounds)
    return assignment, counts, lengths


def strongest_components(right: Tensor, down: Tensor, n_components: int, backend: str = "auto") -> Tensor:
    """Number the components along the strongest edges of every image: as few edges as leave `n_components`.

    An edge lowers the number of components by one at most, so every number is reached. How many edges that takes
    is found for all images at once: by bisection, or with torch, where a labelling is many operations, from a spanning
    tree. Nothing is read back from the device.

    Args:
        right, down: strength of every edge; of equal ones the first in row-major order is the strongest, those of
            `right` before those of `down`; NaN is the weakest.
        n_components: from 1 to gh·gw.
        backend: and the assignment that is returned: see `grid_components`.
    """
    backend = _chosen(backend, right, down)
    low, high = int(right.shape[1] * down.shape[2] - n_components), int(right[0].numel() + down[0].numel())
    strength = _together(right, down).nan_to_num(nan=-math.inf)
    right, down = _apart(ranks(strength), right, down)
    if backend == "torch":
        return propagated_components(*strongest_edges(right, down, n_components))[0]
    if backend != "opencv":
        return _bisect(BACKENDS[backend], right, down, n_components, low, high)
    found = _bisect(_opencv_labels, right.cpu().numpy(), down.cpu().numpy(), n_components, low, high)
    return torch.from_numpy(found).to(right.device)


def _bisect(label: Callable, right: Any, down: Any, n_components: int, low: Any, high: Any) -> Any:
    """The assignment by `label`, of tensors or of NumPy arrays, along as few of the first edges as it takes.

    right, down: rank of every edge, from 0; low, high: bounds of the number of edges.
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
    check_choice("backend", backend, ("auto", *BACKENDS))
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
    powers_of_2 = [1 << (int(side) - 1).bit_length() for side in (right.shape[1], down.shape[2])]  # tensors in a trace
    fits = math.prod(powers_of_2) <= MAX_ON_CHIP
    return "triton" if right.device.type == "cuda" and HAS_TRITON and fits else "torch"


def _together(right: Tensor, down: Tensor) -> Tensor:
    """The K edges of every image in one row: (B, K)."""
    return torch.cat([right.flatten(1), down.flatten(1)], 1)


def _apart(edges: Tensor, right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `_together`: from (B, K) to the shapes of `right` and `down`."""
    first, second = edges.split([right[0].numel(), down[0].numel()], 1)
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
    """Number labels, (B, N), from 0 in each image in the order of their first appearance, and count them, (B,).

    labels: integers from 1 without gaps; no two images share one.
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

    right, down, and (assignment, counts): as in `grid_components`; rounds: None for `propagation_rounds`.
    """
    n_images, gh, gw = images_in(right), right.shape[1], down.shape[2]
    labels = torch.arange(n_images * gh * gw, device=right.device)
    index = labels.view(n_images, gh, gw)
    # Every patch's right and lower one; itself where there is no edge.
    neighbors = torch.stack([index + F.pad(right, (0, 1)), index + gw * F.pad(down, (0, 0, 0, 1))]).flatten(1)
    for _ in range(propagation_rounds(gh * gw) if rounds is None else rounds):
        theirs = labels[neighbors]
        low, high = torch.minimum(labels, theirs), torch.maximum(labels, theirs)
        labels = labels.scatter_reduce(0, high.flatten(), low.flatten(), "amin")
        labels = labels[labels]
        labels = labels[labels]
    settled = (labels[neighbors] == labels).view(2, n_images, -1).all(2).all(0)
    number = (labels == index.flatten()).view(n_images, -1).cumsum(1)  # of the root of every component, from 1
    return number.flatten()[labels].view(n_images, -1) - 1, number[:, -1] * settled


def strongest_edges(right: Tensor, down: Tensor, n_components: int) -> tuple[Tensor, Tensor]:
    """Masks of as few of the strongest edges as leave `n_components`, none of which closes a circle.

    The first edges of a maximum spanning tree join the same patches as all edges down to the same strength. The
    number of operations depends on the grid alone, and nothing is read back from the device.

    right, down: int64, rank of every edge in its image, the strongest first, from 0.
    """
    n_patches = right.shape[1] * down.shape[2]
    place = _together(right, down)
    order = inverse(place)
    in_tree = _spanning_tree(_ends(right, down, order), images_in(right), n_patches).view(order.shape)
    chosen = in_tree * (in_tree.cumsum(1) <= n_patches - n_components)
    return _apart(chosen.gather(1, place).bool(), right, down)


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

    ends: (2, B·K), from `_ends`, each connected grid's edges from the strongest on. Returns (B·K,), int64, 1 for the
    edges of the trees.
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


def _triton_components(right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    from g2tm.triton_components import components  # needs Triton, which is not everywhere

    return components(right, down)


BACKENDS = {"opencv": _opencv_components, "torch": propagated_components, "triton": _triton_components}
