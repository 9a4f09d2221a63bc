"""CrossGET (ICML 2024, arXiv 2305.17455), vision side: complete-graph soft matching, by importance if there is one."""

import torch
from torch import Tensor

from g2tm.reduction import Grouping, one_by_one
from g2tm.selection import batch_and_length, falling, or_ones, own_positions, rows, selection, true_positions
from g2tm.similarity import LOWEST, diagonal, most_similar, unit_vectors
from g2tm.validation import check_r


@one_by_one
@selection
def crossget(
    metric: Tensor,
    *,
    r: int,
    importance: Tensor | None = None,
    sizes: Tensor | None = None,
    padding: Tensor | None = None,
    suffix: int = 0,
) -> Grouping:
    """Choose the tokens that merge, and those that they merge into, among all pairs (section 3.3).

    Tokens stay in their old order. With importance the result is a `WeightedSum`.

    Args:
        metric, r, sizes, padding: see `g2tm`.
        importance: (B, N): an important token merges later and counts more in its pair; None: all count the same.
        suffix: number of tokens at the end that take no part.
    """
    check_r(r)
    n_images, n_tokens = batch_and_length(metric)
    if suffix < 0:
        raise ValueError(f"suffix {suffix}: give the number of tokens at the end that take no part")
    kind = Grouping if importance is None else WeightedSum
    r = min(r, n_tokens // 2, max(n_tokens - suffix - 1, 0))
    if r == 0 or n_images == 0:
        return kind.identity(metric, sizes)
    position = torch.arange(n_tokens, device=metric.device)
    protected = position >= n_tokens - suffix
    unit = unit_vectors(metric)
    order = falling(nearness(unit, protected))
    ranked, is_protected = rows(unit, order), protected[order]

    def later(product: Tensor, first: int) -> None:
        after = position > position[first : first + product.shape[1], None]
        product.masked_fill_(~after, LOWEST)

    best, _ = most_similar(ranked, ranked, is_protected, later)
    priority = torch.empty_like(best).scatter_(1, order, best.masked_fill(is_protected, LOWEST))
    if importance is not None:
        priority = priority - importance
    sources = falling(priority)[:, :r]
    is_source = torch.zeros_like(priority, dtype=torch.bool).scatter_(1, sources, 1)
    _, targets = most_similar(rows(unit, sources), unit, is_source | protected)
    target, weights = own_positions(metric).scatter(1, sources, targets), None
    if importance is not None:
        sizes = or_ones(sizes, priority)
        weights = sizes * _factor(importance, sources, targets)
    return kind.of_targets(target, true_positions(~is_source, n_tokens - r), sizes, weights)


def nearness(unit: Tensor, protected: Tensor) -> Tensor:
    """Similarity of every token, (B, N, D), to its nearest one: (B, N), -inf for protected tokens, (N,).

    Two tokens that are each other's nearest get exactly the same number, whatever rounding makes of the two products.
    """

    def others(product: Tensor, first: int) -> None:
        product.masked_fill_(diagonal(product, first), LOWEST)

    similarity, nearest = most_similar(unit, unit, protected, others)
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
    """(B, N), how often each token's size counts, by the published weights: 2·softmax of a pair's importances, (u, v).

    A source counts u times its size. A destination counts its size once, and (v - 1) times more for each of its
    sources: with several more important ones that is less than nothing.
    """
    u, v = 2 * torch.stack([importance.gather(1, sources), importance.gather(1, targets)]).softmax(0)
    return torch.ones_like(importance).scatter(1, sources, u).scatter_add(1, targets, v - 1)
