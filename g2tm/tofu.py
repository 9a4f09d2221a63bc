"""Token fusion (ToFu, WACV 2024, arXiv 2312.01026): ToMe's matching; early blocks prune, late ones merge."""

import torch
from torch import Tensor

from g2tm.matching import bipartite, sides
from g2tm.reduction import Grouping
from g2tm.selection import at_least_float32, images_in
from g2tm.validation import check_choice

VARIANTS = ("code", "paper")


def prunes(layer: int, depth: int) -> bool:
    """Return whether a block, 1-based, drops what it matches; the later ones of the `depth` blocks merge it.

    The published code switches after the middle: of 12 layers, 1 to 7 prune and 8 to 12 merge.
    """
    return layer - 1 <= depth // 2


def tofu(
    metric: Tensor,
    *,
    r: int,
    prune: bool,
    sizes: Tensor | None = None,
    padding: Tensor | None = None,
    odd_first: bool = True,
    variant: str = "code",
) -> Grouping:
    """Match tokens as ToMe does, then drop the sources or merge them.

    The mean is unweighted at every depth. Sizes are tracked all the same: they are sums over the assignment.
    The order is that of `bipartite`. Two steps that prune compose to one; any other two to a chain.

    Args:
        metric, r, sizes, padding, odd_first: see `g2tm`.
        prune: True: a source is dropped, its destination stays as it is. False: they merge, see `NormCorrected`.
        variant: how the norm is corrected, "code" or "paper".
    """
    check_choice("variant", variant, VARIANTS)
    matching = bipartite(metric, r=r, sizes=sizes, padding=padding, odd_first=odd_first)
    present = torch.ones_like(matching.assignment, dtype=torch.float32)
    present = present if padding is None else present.masked_fill(padding, 0)
    destinations = _destinations(matching, present, odd_first)
    if not prune:
        return NormCorrected(matching, present, destinations, variant == "paper")
    return Grouping(matching.assignment, matching.counts, matching.lengths, matching.old_sizes, destinations)


def _destinations(matching: Grouping, present: Tensor, odd_first: bool) -> Tensor:
    """(B, N), float32: 1 for the token that each group is built on, 0 for sources and padding.

    present: (B, N), float32, 0 for padding. A group has at most one token at an odd position. That is its
    destination; a group without one is a single token.
    """
    assignment, (_, odd) = matching.assignment, sides(odd_first)
    has_odd = present.new_zeros(images_in(assignment), matching.width)
    has_odd.scatter_add_(1, assignment[:, odd], present[:, odd])
    sources = has_odd.gather(1, assignment)
    sources[:, odd] = 0
    return present * (1 - sources)


class NormCorrected(Grouping):
    """Reduction to means that get the largest norm of their group back, as far as the published code does so.

    The mean is multiplied by the largest norm of the group, and divided by the norm of its destination (the code) or
    by its own norm (MLERP, the paper). A mean whose divisor is zero stays as it is.

    present, destinations: (B, N), float32, 0 for padding, and 1 for the token that each group is built on.
    """

    def __init__(self, matching: Grouping, present: Tensor, destinations: Tensor, paper: bool) -> None:
        super().__init__(matching.assignment, matching.counts, matching.lengths, matching.old_sizes, present)
        self._destinations, self._paper = destinations, paper

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, M, D), in the dtype of x; the correction is differentiable."""
        values = at_least_float32(x)
        mean, norms = super().merge(values), torch.linalg.vector_norm(values, dim=-1)
        largest = torch.zeros_like(mean[..., 0])
        largest = largest.scatter_reduce(1, self.assignment, norms * self.all_weights, "amax")
        own_norm = torch.linalg.vector_norm(mean, dim=-1)
        divisor = own_norm if self._paper else self._group_sums(norms * self._destinations)
        positive = divisor > 0
        factor = torch.where(positive, largest / torch.where(positive, divisor, 1), 1)
        return (mean * factor.unsqueeze(-1)).to(x.dtype)
