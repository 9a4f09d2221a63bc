"""Token fusion (ToFu, WACV 2024, arXiv 2312.01026): ToMe's matching; early blocks prune, late ones merge."""

from typing import Any

import torch
from torch import Tensor

from g2tm.matching import bipartite
from g2tm.reduction import Grouping
from g2tm.selection import images_in, precise

VARIANTS = ("code", "paper")


def prunes(layer: int, depth: int) -> bool:
    """Whether a block drops what it matches; the later blocks merge it.

    The published code switches after the middle: of 12 layers, 1 to 7 prune and 8 to 12 merge.

    Args:
        layer: 1-based.
        depth: number of blocks.
    """
    return layer - 1 <= depth // 2


def tofu(
    metric: Tensor,
    *,
    r: int,
    prune: bool,
    sizes: Tensor | None = None,
    prefix: int = 1,
    padded: bool = True,
    variant: str = "code",
) -> Grouping:
    """Match tokens as ToMe does, then drop the sources or merge them.

    The mean is unweighted at every depth. Sizes are tracked all the same: they are sums over the assignment.

    Args:
        metric, r, sizes, prefix, padded: as in `g2tm.matching.bipartite`; the whole sequence, prefix tokens first.
        prune: True: a source is dropped, its destination stays as it is. False: they merge, see `NormCorrected`.
        variant: how the norm is corrected, "code" or "paper".

    Returns:
        A reduction of the whole sequence: prefix tokens, A tokens that stay, B tokens, each in their old order. Two
        steps that prune compose to one; any other two compose to a chain.

    Raises:
        ValueError: an unknown variant, or a value that `bipartite` does not allow.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose {' or '.join(VARIANTS)}")
    matching = bipartite(metric, r=r, sizes=sizes, prefix=prefix, padded=padded)
    present = torch.ones_like(matching.assignment, dtype=torch.float32)
    if padded and sizes is not None:
        present[:, prefix:] = (sizes[:, prefix:] > 0).float()
    destinations = _destinations(matching, present)
    weights = destinations if prune else present
    step = matching.assignment, matching.counts, matching.lengths, sizes, weights
    return Grouping(*step) if prune else NormCorrected(*step)._marked(destinations, variant == "paper")


def _destinations(matching: Grouping, present: Tensor) -> Tensor:
    """(B, N), float32: 1 for the token that each group is built on, 0 for sources and padding.

    present: (B, N), float32, 0 for padding. A group has at most one token at an odd position. That is its
    destination; a group without one is a single token.
    """
    assignment, odd = matching.assignment, slice(1, None, 2)
    has_odd = present.new_zeros(images_in(assignment), matching.width)
    has_odd.scatter_add_(1, assignment[:, odd], present[:, odd])
    sources = has_odd.gather(1, assignment)
    sources[:, odd] = 0
    return present * (1 - sources)


class NormCorrected(Grouping):
    """Reduction to means that get the largest norm of their group back, as far as the published code does so.

    The mean is multiplied by the largest norm of the group, and divided by the norm of its destination (the code) or
    by its own norm (MLERP, the paper). A mean whose divisor is zero stays as it is.
    """

    def _marked(self, destinations: Tensor, paper: bool) -> "NormCorrected":
        """Itself, told which token each group is built on, (B, N), and which form to use."""
        self._destinations, self._paper = destinations, paper
        return self

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, M, D), in the dtype of x; the correction is differentiable."""
        values = precise(x)
        mean, norms = super().merge(values), torch.linalg.vector_norm(values, dim=-1)
        largest = torch.zeros_like(mean[..., 0])
        largest = largest.scatter_reduce(1, self.assignment, norms * self._all_weights, "amax")
        if self._paper:
            divisor = torch.linalg.vector_norm(mean, dim=-1)
        else:
            divisor = self._group_sums(norms * self._destinations)
        positive = divisor > 0
        factor = torch.where(positive, largest / torch.where(positive, divisor, 1), 1)
        return (mean * factor.unsqueeze(-1)).to(x.dtype)

    def without_prefix(self, prefix: int) -> "NormCorrected":
        """The same step for the patch tokens alone."""
        rest: Any = super().without_prefix(prefix)
        return rest._marked(self._destinations[:, prefix:], self._paper)

    def widened(self, width: int) -> "NormCorrected":
        """The same step with padding up to `width` groups."""
        wide: Any = super().widened(width)
        return wide._marked(self._destinations, self._paper)
