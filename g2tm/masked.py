"""The training form of methods that remove tokens: all stay, and a mask takes the removed ones out of attention.

The mask is 0 or 1 on the way forward, and carries the gradient of a soft decision on the way back.
"""

import torch
from torch import Tensor

from g2tm.reduction import Grouping, Reduction, equal_counts
from g2tm.selection import rows


def above(values: Tensor, threshold: Tensor | float, temperature: float) -> Tensor:
    """1 where a value is above the threshold, else 0; with the gradient of σ((value - threshold) / temperature)."""
    soft = torch.sigmoid((values - threshold) / temperature)
    return straight_through((soft > 0.5).to(soft.dtype), soft)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The hard numbers, with the gradient of the soft ones."""
    return hard + (soft - soft.detach())


def masked_softmax(logits: Tensor, mask: Tensor, epsilon: float, keeps_self: bool) -> Tensor:
    """Attention probabilities from which masked tokens fade (DiffRate, section 3.4; LTMP, section 3.2).

    logits: (B, H, L, L) or the first rows of it, as the result; mask: (B, L), of the keys; epsilon: keeps a row without
    keys finite; keeps_self: True: a masked token attends to itself all the same.
    """
    keys = mask[:, None, None]
    if keeps_self:
        own = torch.eye(logits.shape[-2], logits.shape[-1], dtype=torch.bool, device=logits.device)
        keys = torch.where(own, 1.0, keys)
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * keys
    return (weights + epsilon / logits.shape[-1]) / (weights.sum(-1, keepdim=True) + epsilon)


class MaskedTokens(Reduction):
    """A step that keeps all N tokens, in a new order: some become means, and a mask says which count from now on.

    Args:
        group: (B, N), int64; for every old token the new position of the mean that it enters.
        weights: (B, N), what it counts there; no gradient.
        order: (B, N), int64; the old position of every new token. A token that enters another's mean keeps its value.
        sizes, mask: (B, N), of the new tokens.
        assignment: (B, N), for every old token the new position of the one that carries it.
    """

    def __init__(
        self, group: Tensor, weights: Tensor, order: Tensor, sizes: Tensor, mask: Tensor, assignment: Tensor
    ) -> None:
        self.sizes, self.mask, self.assignment, self._order = sizes, mask, assignment, order
        self.counts, self.lengths = equal_counts(group, int(group.shape[1]))
        self._means = Grouping(group, self.counts, self.lengths, weights=weights)

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, D), in the dtype of x; differentiable in x alone."""
        position = torch.arange(x.shape[1], device=x.device)
        keeps = self._means.assignment.gather(1, self._order) != position  # enters the mean of another
        return torch.where(keeps.unsqueeze(2), rows(x, self._order), self._means.merge(x))
