"""Multi-criteria token fusion (MCTF, CVPR 2024, arXiv 2403.10030): similarity, information and size choose."""

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import TINY, Grouping
from g2tm.selection import LOWEST, extent, most_similar, places, precise, selection
from g2tm.validation import check_r


@selection
def mctf(
    tokens: Tensor,
    *,
    r: int,
    importance: Tensor,
    tau: tuple[float, float, float] = (1, 0, 0),
    bidirectional: bool = True,
    sizes: Tensor | None = None,
    prefix: int = 1,
) -> Grouping:
    """Match even with odd positions by their attraction, in one direction and then in the other (section 3).

    Args:
        tokens: (B, L, D), the input of the block, prefix tokens first.
        r: number of tokens to remove, at most half of the patch tokens.
        importance: (B, L), mean attention that each token gets, over heads and queries.
        tau: temperatures of similarity, information and size; 0 leaves a criterion out. The published code's default
            is (1, 0, 0), the paper's (1, 20, 40).
        bidirectional: whether half of the tokens that leave are at odd positions.
        sizes: (B, L), patches that each token carries; None: one each.
        prefix: number of prefix tokens, which take no part.

    Returns:
        A `Grouping` of the whole sequence, weighted by size times importance: prefix tokens, even positions that
        stay, odd positions that stay; the last, in both directions, by falling attraction.

    Raises:
        ValueError: r is no number of tokens.
    """
    check_r(r)
    n_images, length = extent(tokens)
    r = min(r, (length - prefix) // 2)
    sizes = torch.ones_like(importance) if sizes is None else sizes
    importance = importance.clamp(min=TINY)  # attention may underflow, and a token alone keeps its value
    weights = sizes * importance
    if r == 0 or n_images == 0:
        return Grouping.identity(tokens, sizes)
    position = torch.arange(length, device=tokens.device)
    unit, factor = F.normalize(precise(tokens), dim=-1), _factor(importance, sizes, tau)
    factor = factor.masked_fill(position < prefix, LOWEST)  # takes no part
    (a, b), (factor_a, factor_b) = ((x[:, ::2], x[:, 1::2]) for x in (unit, factor))
    even, odd = position[::2], position[1::2]

    first_r = r // 2 if bidirectional else r
    attraction, partner = attractions(a, b, factor_a, factor_b, tau[0])
    by_attraction = attraction.argsort(dim=1, descending=True, stable=True)
    leaving = by_attraction[:, :first_r]
    left = torch.zeros_like(attraction, dtype=torch.bool).scatter_(1, leaving, 1)
    stay_a = places(~left, left.shape[1] - first_r)
    target = position.repeat(n_images, 1)
    target.scatter_(1, even[leaving], odd[partner.gather(1, leaving)])
    stay_b = odd.expand(n_images, -1)
    if bidirectional:
        attraction, partner = attractions(b, a, factor_b, factor_a.masked_fill(left, LOWEST), tau[0])
        by_attraction = attraction.argsort(dim=1, descending=True, stable=True)
        leaving, stay_b = by_attraction[:, : r - first_r], odd[by_attraction[:, r - first_r :]]
        target.scatter_(1, odd[leaving], even[partner.gather(1, leaving)])
        target = target.gather(1, target)  # a token whose target has left goes along with it
    survivors = torch.cat([even[stay_a], stay_b], 1)
    prefix_first = survivors.clamp(max=prefix).argsort(dim=1, stable=True)
    survivors = survivors.gather(1, prefix_first)
    return Grouping.of_targets(target, survivors, sizes, weights)


def attractions(a: Tensor, b: Tensor, factor_a: Tensor, factor_b: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """The b that attracts every a most: `most_similar`, but for ((cos + 1) / 2)^(1 / tau) times both factors.

    Args:
        a, b: (B, I, D) and (B, J, D), normalized.
        factor_a, factor_b: (B, I) and (B, J), positive, or -inf for a token that takes no part.
        tau: of similarity; 0 leaves it out.
    """
    closed_a, closed_b = factor_a == LOWEST, factor_b == LOWEST

    def attract(product: Tensor, first: int) -> None:
        product.add_(1).div_(2).clamp_(min=0)
        if tau == 0:
            product.fill_(1)
        elif tau != 1:
            product.pow_(1 / tau)
        product.mul_(factor_a[:, first : first + product.shape[1], None]).mul_(factor_b[:, None])
        product.masked_fill_(closed_b[:, None], LOWEST)

    attraction, partner = most_similar(a, b, attract)
    return attraction.masked_fill(closed_a, LOWEST), partner


def _factor(importance: Tensor, sizes: Tensor, tau: tuple[float, float, float]) -> Tensor:
    """(B, L), what a token adds to its attractions: more the less it is attended to, and the smaller it is."""
    factor = torch.ones_like(importance)
    for criterion, temperature in ((importance, tau[1]), (sizes, tau[2])):
        if temperature != 0:
            factor = factor * (criterion.amin(1, keepdim=True) / criterion).pow(1 / temperature)
    return factor
