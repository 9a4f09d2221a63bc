"""Mean and spread of the similarities of a model's tokens, for ALGM's automatic threshold (section 3.4)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.selection import selection


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
