"""CrossGET (ICML 2024, arXiv 2305.17455), vision side: complete-graph soft matching, by importance if there is one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import Grouping
from g2tm.selection import LOWEST, extent, itself, most_similar, places, precise, rows, selection
from g2tm.validation import check_r


@selection
def crossget(
    metric: Tensor,
    *,
    r: int,
    importance: Tensor | None = None,
    sizes: Tensor | None = None,
    prefix: int = 1,
    suffix: int = 0,
) -> Grouping:
    """Choose the tokens that merge, and those that they merge into, among all pairs (section 3.3).

    Args:
        metric: (B, L, D), what tokens are compared by (cosine); the whole sequence, prefix tokens first.
        r: number of tokens to remove, at most half of those behind the prefix.
        importance: (B, L): an important token merges later and counts more in its pair; None: all count the same.
        sizes: (B, L), patches that each token carries; None: one each.
        prefix, suffix: number of tokens in front and at the end that take no part.

    Returns:
        A `Grouping` of the whole sequence, tokens in their old order; with importance, a `WeightedSum`.

    Raises:
        ValueError: r is no number of tokens.
    """
    check_r(r)
    n_images, length = extent(metric)
    r = min(r, (length - prefix) // 2)
    if r == 0 or n_images == 0:
        return Grouping.identity(metric, sizes)
    position = torch.arange(length, device=metric.device)
    protected = (position < prefix) | (position >= length - suffix)
    unit = F.normalize(precise(metric), dim=-1)
    order = nearness(unit, protected).argsort(dim=1, descending=True, stable=True)
    ranked, is_protected = rows(unit, order), protected[order]

    def later(product: Tensor, first: int) -> None:
        after = position > position[first : first + product.shape[1], None]
        product.masked_fill_(~after | is_protected[:, None], LOWEST)

    best, _ = most_similar(ranked, ranked, later)
    priority = torch.empty_like(best).scatter_(1, order, best.masked_fill(is_protected, LOWEST))
    if importance is not None:
        priority = priority - importance
    sources = priority.argsort(dim=1, descending=True, stable=True)[:, :r]
    is_source = torch.zeros_like(priority, dtype=torch.bool).scatter_(1, sources, 1)
    taken = is_source | protected

    def destinations_alone(product: Tensor, _: int) -> None:
        product.masked_fill_(taken[:, None], LOWEST)

    _, targets = most_similar(rows(unit, sources), unit, destinations_alone)
    step = position.repeat(n_images, 1).scatter_(1, sources, targets), places(~is_source, length - r), sizes
    if importance is None:
        return Grouping.of_targets(*step)
    sizes = torch.ones_like(priority) if sizes is None else sizes
    return WeightedSum.of_targets(*step, sizes * _factor(importance, sources, targets))


def nearness(unit: Tensor, protected: Tensor) -> Tensor:
    """Similarity of every token to its nearest one: (B, L), -inf for protected tokens.

    Two tokens that are each other's nearest get exactly the same number, whatever rounding makes of the two products.

    Args:
        unit: (B, L, D), normalized.
        protected: (L,), bool, tokens that take no part.
    """

    def others(product: Tensor, first: int) -> None:
        product.masked_fill_(protected | itself(product, first), LOWEST)

    similarity, nearest = most_similar(unit, unit, others)
    position = torch.arange(unit.shape[1], device=unit.device)
    mutual = nearest.gather(1, nearest) == position
    similarity = torch.where(mutual, torch.maximum(similarity, similarity.gather(1, nearest)), similarity)
    return similarity.masked_fill(protected, LOWEST)


class WeightedSum(Grouping):
    """Reduction to weighted sums that are divided by the sizes of the groups, not by the weights."""

    @property
    def _weight_sums(self) -> Tensor:
        return self.sizes


def _factor(importance: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """(B, L), how often each token's size counts, by the published weights: 2·softmax of a pair's importances, (u, v).

    A source counts u times its size. A destination counts its size once, and (v - 1) times more for each of its
    sources: with several more important ones that is less than nothing.
    """
    u, v = 2 * torch.stack([importance.gather(1, sources), importance.gather(1, targets)]).softmax(0)
    return torch.ones_like(importance).scatter(1, sources, u).scatter_add(1, targets, v - 1)
