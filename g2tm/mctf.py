"""Multi-criteria token fusion (MCTF, CVPR 2024, arXiv 2403.10030): similarity, information and size choose."""

import torch
from torch import Tensor

from g2tm.matching import sides
from g2tm.reduction import TINY, Grouping, one_by_one
from g2tm.selection import batch_and_length, falling, or_ones, own_positions, selection, true_positions
from g2tm.similarity import LOWEST, most_similar, unit_vectors
from g2tm.validation import check_r


@one_by_one
@selection
def mctf(
    x: Tensor,
    *,
    r: int,
    importance: Tensor,
    tau: tuple[float, float, float] = (1, 0, 0),
    bidirectional: bool = True,
    sizes: Tensor | None = None,
    padding: Tensor | None = None,
    odd_first: bool = True,
) -> Grouping:
    """Match even with odd positions by their attraction, in one direction and then in the other (section 3).

    Means are weighted by size times importance. The order is: even positions that stay, then odd positions that stay;
    the last, in both directions, by falling attraction.

    Args:
        x, r, sizes, padding, odd_first: see `g2tm`; x is the input of the block.
        importance: (B, N), mean attention that each token gets, over heads and queries.
        tau: temperatures of similarity, information and size; 0 leaves a criterion out. The published code's default
            is (1, 0, 0), the paper's (1, 20, 40).
        bidirectional: half of the tokens that leave are at odd positions.
    """
    check_r(r)
    n_images, n_tokens = batch_and_length(x)
    r = min(r, n_tokens // 2)
    sizes = or_ones(sizes, importance)
    if r == 0 or n_images == 0:
        return Grouping.identity(x, sizes)
    importance = importance.clamp(min=TINY)  # attention may underflow, and a token alone keeps its value
    position = torch.arange(n_tokens, device=x.device)
    unit, factor = unit_vectors(x), _factor(importance, sizes, tau)
    (a, factor_a, even), (b, factor_b, odd) = ((unit[:, s], factor[:, s], position[s]) for s in sides(odd_first))

    first_r = r // 2 if bidirectional else r
    attraction, partner = attractions(a, b, factor_a, factor_b, tau[0])
    leaving = falling(attraction)[:, :first_r]
    left = torch.zeros_like(attraction, dtype=torch.bool).scatter_(1, leaving, 1)
    target = own_positions(x).scatter(1, even[leaving], odd[partner.gather(1, leaving)])
    stay_b = odd.expand(n_images, -1)
    if bidirectional:
        attraction, partner = attractions(b, a, factor_b, factor_a.masked_fill(left, LOWEST), tau[0])
        by_attraction = falling(attraction)
        leaving, stay_b = by_attraction[:, : r - first_r], odd[by_attraction[:, r - first_r :]]
        target.scatter_(1, odd[leaving], even[partner.gather(1, leaving)])
        target = target.gather(1, target)  # a token whose target has left goes along with it
    survivors = torch.cat([even[true_positions(~left, len(even) - first_r)], stay_b], 1)
    return Grouping.of_targets(target, survivors, sizes, sizes * importance)


def attractions(a: Tensor, b: Tensor, factor_a: Tensor, factor_b: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Find the b that attracts every a most, by ((cos + 1) / 2)^(1 / tau) times both factors.

    Args:
        a, b: (B, I, D) and (B, J, D), normalized.
        factor_a, factor_b: (B, I) and (B, J), positive; -inf for a token of b that takes no part.
        tau: of similarity; 0 leaves it out.

    Returns:
        (attractions, indices), (B, I) each; of equal ones the first.
    """

    def attract(product: Tensor, first: int) -> None:
        product.add_(1).div_(2).clamp_(min=0)
        if tau == 0:
            product.fill_(1)
        elif tau != 1:
            product.pow_(1 / tau)
        product.mul_(factor_a[:, first : first + product.shape[1], None]).mul_(factor_b[:, None])

    return most_similar(a, b, factor_b == LOWEST, attract)


def _factor(importance: Tensor, sizes: Tensor, tau: tuple[float, float, float]) -> Tensor:
    """(B, N), what a token adds to its attractions: more the less it is attended to, and the smaller it is."""
    factor = torch.ones_like(importance)
    for criterion, temperature in ((importance, tau[1]), (sizes, tau[2])):
        if temperature != 0:
            factor = factor * (criterion.amin(1, keepdim=True) / criterion).pow(1 / temperature)
    return factor
