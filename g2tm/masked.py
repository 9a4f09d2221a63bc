"""The training form of methods that remove tokens: all stay, and a mask takes the removed ones out of attention.

The mask is 0 or 1 on the way forward, and carries the gradient of a soft decision on the way back.
"""

from typing import Self

import torch
from torch import Tensor

from g2tm.reduction import Chain, Grouping, Reduction
from g2tm.selection import rows


def above(values: Tensor, threshold: Tensor, temperature: float) -> Tensor:
    """1 where a value is above the threshold, else 0; with the gradient of σ((value - threshold) / temperature)."""
    soft = torch.sigmoid((values - threshold) / temperature)
    return straight_through((soft > 0.5).to(soft.dtype), soft)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """The hard numbers, with the gradient of the soft ones."""
    return hard + (soft - soft.detach())


def masked_softmax(logits: Tensor, mask: Tensor, epsilon: float, keeps_self: bool) -> Tensor:
    """Attention probabilities from which masked tokens fade (DiffRate, section 3.4; LTMP, section 3.2).

    Args:
        logits: (B, H, L, L) or, for the first rows of it, (B, H, I, L).
        mask: (B, L), of the keys.
        epsilon: what keeps a row without keys finite.
        keeps_self: whether a masked token attends to itself all the same.

    Returns:
        As the logits.
    """
    keys = mask[:, None, None]
    if keeps_self:
        own = torch.eye(logits.shape[-2], logits.shape[-1], dtype=torch.bool, device=logits.device)
        keys = torch.where(own, 1.0, keys)
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * keys
    return (weights + epsilon / logits.shape[-1]) / (weights.sum(-1, keepdim=True) + epsilon)


class Masked:
    """A step that keeps all N tokens, in a new order: some become means, and a mask says which count from now on.

    Args:
        group: (B, N), int64; for every old token the new position of the mean that it enters.
        weights: (B, N), what it counts there; no gradient.
        order: (B, N), int64; the old position of every new token. A token that enters another's mean keeps its value.
        sizes: (B, N), of the new tokens.
        mask: (B, N), of the new tokens.
        assignment: (B, N), for every old token the new position of the one that carries it.

    Attributes:
        assignment, sizes, mask: as given.
        counts, lengths: N for every image.
        padding: None.
    """

    padding = None

    def __init__(
        self, group: Tensor, weights: Tensor, order: Tensor, sizes: Tensor, mask: Tensor, assignment: Tensor
    ) -> None:
        self._given = group, weights, order, sizes, mask, assignment
        self.sizes, self.mask, self.assignment = sizes, mask, assignment
        n_images, n_tokens = map(int, group.shape)
        self.counts = torch.full((n_images,), n_tokens, device=group.device)
        self.lengths = (n_tokens,) * n_images

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, D), in the dtype of x; differentiable in x."""
        group, weights, order, *_ = self._given
        means = Grouping(group, self.counts, self.lengths, weights=weights, width=group.shape[1]).merge(x)
        position = torch.arange(group.shape[1], device=group.device)
        keeps = group.gather(1, order) != position  # enters the mean of another
        return torch.where(keeps.unsqueeze(2), rows(x, order), means)

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """y: (B, N, D) -> (B, N, D), every old position gets the token that carries it."""
        return rows(y, self.assignment)

    def then(self, second: Reduction) -> Chain:
        """This step followed by `second`."""
        return Chain(self, second)

    def without_prefix(self, prefix: int) -> Self:
        """The same step for the patch tokens alone, where `prefix` tokens come first before and after it."""
        group, weights, order, sizes, mask, assignment = (x[:, prefix:] for x in self._given)
        return type(self)(group - prefix, weights, order - prefix, sizes, mask, (assignment - prefix).clamp(min=0))
