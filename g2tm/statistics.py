"""Mean and spread of the similarities of a model's tokens: of all for ALGM's automatic threshold (section 3.4), and by
class."""

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.selection import selection
from g2tm.validation import check_grid


@selection
def similarity_moments(x: Tensor) -> Tensor:
    """Number, sum and sum of squares of the cosine similarities of all pairs of tokens of an image: (3,), float64.

    x: (B, N, D); of Apple's GPUs, which lack float64, computed on the CPU. Exact without an N×N matrix: with unit
    vectors u, the sum over all i, j of u_i·u_j is |Σu|², and that of (u_i·u_j)² is the squared norm of the D×D matrix
    Σ u uᵀ.
    """
    x = x.cpu() if x.device.type == "mps" else x
    unit = F.normalize(x.double(), dim=-1)
    n_images, n_tokens = x.shape[:2]
    own = unit.square().sum(-1)  # 1, or 0 for a zero vector
    total = unit.sum(1).square().sum() - own.sum()
    squares = torch.einsum("bnd,bne->bde", unit, unit).square().sum() - own.square().sum()
    pairs = torch.tensor(n_images * n_tokens * (n_tokens - 1), dtype=torch.float64, device=x.device)
    return torch.stack([pairs, total, squares]) / 2


@selection
def class_similarity_moments(
    x: Tensor, grid: tuple[int, int], labels: Tensor, window: tuple[int, int] | None = None
) -> Tensor:
    """Number and sum of the cosine similarities of pairs of tokens in a window, by whether they are of one class.

    ALGM (section 3.1) looks at them over window sizes and layers. As in `similarity_moments`, no pair is formed.

    Args:
        x, grid: see `g2tm`.
        labels: (B, N), integer, the class of every token; those below 0 are left out.
        window: patches, (height, width); windows that hang over the edge count as far as they reach. None: the image.

    Returns:
        (2, 2), float64: pairs of one class and pairs of different classes, each as (number, sum).

    Raises:
        ValueError: labels or a grid that do not fit the tokens.
    """
    check_grid(grid, x.shape[1])
    if labels.shape != x.shape[:2]:
        raise ValueError(f"labels of shape {tuple(labels.shape)}: give one per token, {tuple(x.shape[:2])}")
    x = x.cpu() if x.device.type == "mps" else x
    labels = labels.to(x.device)
    known = labels >= 0
    height, width = grid if window is None else window
    row = torch.arange(grid[0], device=x.device) // height
    column = torch.arange(grid[1], device=x.device) // width
    place = (row[:, None] * grid[1] + column).flatten()
    image = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    places, unit = (image + place)[known], F.normalize(x.double(), dim=-1)[known]
    every = _pairs_in(places, unit)
    own = _pairs_in(torch.stack([places, labels[known]], dim=1), unit)
    return torch.stack([own, every - own])


def _pairs_in(groups: Tensor, unit: Tensor) -> Tensor:
    """Number and sum of the inner products of pairs of unit vectors, (K, D), within groups, (K,) or (K, M): (2,)."""
    _, group, sizes = groups.unique(dim=0, return_inverse=True, return_counts=True)
    sums = unit.new_zeros(len(sizes), unit.shape[1]).index_add_(0, group, unit)
    pairs = (sizes * (sizes - 1)).sum().double()
    return torch.stack([pairs, sums.square().sum() - unit.square().sum()]) / 2


def mean_and_std(moments: Tensor) -> tuple[float, float]:
    """(mean, population standard deviation) from summed `similarity_moments`.

    Raises:
        ValueError: the moments are those of no pair at all.
    """
    pairs, total, squares = moments.tolist()
    if pairs == 0:
        raise ValueError("no pair of tokens to compare: give images of at least two patches")
    mean = total / pairs
    return mean, max(squares / pairs - mean**2, 0.0) ** 0.5
