"""What a reduction step did, and how to go back: the protocol, reductions by assignment, and chains of both."""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from g2tm.selection import extent, images_in, precise, repeated, rows

TINY = torch.finfo(torch.float32).tiny


@runtime_checkable
class Reduction(Protocol):
    """From N tokens to M in every image of a batch, and back.

    A reduction by assignment has `assignment` as well, (B, N): for every token the index of the one that carries it.

    Attributes:
        counts: (B,), int64, how many tokens each image keeps; an image with fewer than M has padding behind them.
        lengths: the counts as B numbers, known without asking the device.
        padding: (B, M), bool, True where a slot holds no token; None: no image has any.
        sizes: (B, M), float32, what attention and statistics call a token's size; 0 in the padding.
    """

    @property
    def counts(self) -> Tensor: ...
    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def padding(self) -> Tensor | None: ...
    @property
    def sizes(self) -> Tensor: ...

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, M, D), in the dtype of x; differentiable."""
        ...

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """y: (B, M, D) -> (B, N, D), every position gets its token back.

        scores: the values do not share the scale of the residual stream (class logits, normalized features): a
        constant then stays a constant also where a linear transform would scale it.
        """
        ...

    def then(self, second: "Reduction") -> "Reduction":
        """This step followed by `second`, which acts on the M tokens, seen as one step from N."""
        ...


class Grouping:
    """Reduction by assignment: N tokens to M groups per image.

    Args:
        assignment: (B, N), int64; for every token the index of its group.
        counts: (B,), int64, number of groups of each image.
        lengths: the counts as B numbers.
        sizes: (B, N), what the tokens bring along as their size; None: 1 each. Padding has 0.
        weights: (B, N), how much each token counts in the mean of its group; 0: it is carried along (pruning). None:
            its size.
        width: M, at least the largest count, which it is for None. With a given width the images count as padded.

    Attributes:
        assignment, counts, lengths: as given.
        width: M.
        sizes: (B, M), float32, the sum over the group.
    """

    def __init__(
        self,
        assignment: Tensor,
        counts: Tensor,
        lengths: Sequence[int],
        sizes: Tensor | None = None,
        weights: Tensor | None = None,
        width: int | None = None,
    ) -> None:
        self.assignment = assignment
        self.counts = counts
        self.lengths = tuple(lengths)
        self.width = max(self.lengths, default=assignment.shape[1]) if width is None else width
        self._given_width = width
        self._old_sizes = None if sizes is None else sizes.float()
        self._weights = None if weights is None else weights.float()

    @classmethod
    def of_counts(cls, assignment: Tensor, counts: Tensor, sizes: Tensor | None = None) -> Self:
        """Reduction to `counts` groups per image; waits for the device once, to learn them."""
        if torch.compiler.is_exporting():
            longest = counts.max().item()
            torch._check(longest <= assignment.shape[1])
            return cls(assignment, counts, repeated(longest, 1), sizes, width=longest)
        return cls(assignment, counts, counts.tolist(), sizes)

    @classmethod
    def of_length(cls, assignment: Tensor, length: int, sizes: Tensor | None = None) -> Self:
        """Reduction to `length` groups in every image; nothing to wait for."""
        return cls(assignment, *_equal_counts(assignment, length), sizes)

    @classmethod
    def of_targets(
        cls, target: Tensor, survivors: Tensor, sizes: Tensor | None = None, weights: Tensor | None = None
    ) -> Self:
        """Reduction to the survivors, (B, M), positions in the order of the result; nothing to wait for.

        target: (B, N), for every token the position of the survivor that carries it.
        """
        order = torch.arange(survivors.shape[1], device=target.device).expand_as(survivors)
        assignment = torch.zeros_like(target).scatter_(1, survivors, order).gather(1, target)
        return cls(assignment, *_equal_counts(assignment, survivors.shape[1]), sizes, weights)

    @classmethod
    def identity(cls, x: Tensor, sizes: Tensor | None = None) -> Self:
        """The step that merges none of the tokens x: (B, N, D)."""
        n_images, n_tokens = extent(x)
        return cls.of_length(torch.arange(n_tokens, device=x.device).repeat(n_images, 1), n_tokens, sizes)

    @cached_property
    def sizes(self) -> Tensor:
        return self._group_sums(self._old_sizes)

    @property
    def padded(self) -> bool:
        """Whether images have padding."""
        return self._given_width is not None or min(self.lengths, default=self.width) < self.width

    @property
    def padding(self) -> Tensor | None:
        """(B, M), bool: True where a slot holds no token; None if no image has padding."""
        if not self.padded:
            return None
        return torch.arange(self.width, device=self.counts.device) >= self.counts[:, None]

    def merge(self, x: Tensor) -> Tensor:
        """Weighted mean of every group; differentiable.

        Args:
            x: (B, N, D).

        Returns:
            (B, M, D), in the dtype of x, summed in at least float32; padding is zero.
        """
        values = precise(x)
        weights = self._mean_weights
        totals = self._weight_sums.to(values.dtype).clamp(min=TINY)  # 0 in padding, or where nothing counts
        if weights is not None:  # each token's share of its group
            values = values * (weights / totals.gather(1, self.assignment)).unsqueeze(-1)
        n_images = images_in(x)
        sums = values.new_zeros(n_images * self.width, x.shape[-1])
        groups = self._flat_assignment.unsqueeze(-1).expand(-1, x.shape[-1])
        sums.scatter_add_(0, groups, values.flatten(0, 1))  # in place: half the time, the same gradient
        sums = sums.unflatten(0, (n_images, self.width))
        mean = sums.div_(totals.unsqueeze(-1)) if weights is None else sums
        return mean.to(x.dtype)

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """Give every token the value of its group: y: (B, M, D) -> (B, N, D). `scores` makes no difference."""
        shape = (*self.assignment.shape, *y.shape[2:])
        return y.flatten(0, 1).index_select(0, self._flat_assignment).view(shape)

    def then(self, second: Reduction) -> Reduction:
        """This step followed by `second`, seen as one step; two assignments compose to one.

        Where both take means, so does the composition: a token's weight is its share of its first group times what
        that group counts in the second. Of its size, so much is left as the second step was told of its group's.
        """
        if type(self) is not Grouping or type(second) is not Grouping:
            return Chain(self, second)
        assignment = second.assignment.gather(1, self.assignment)
        weights, sizes = None, self._old_sizes
        if second._weights is not None and second._old_sizes is not None:  # pruned, or discounted by the second step
            left = second._old_sizes / self.sizes.clamp(min=TINY)
            sizes = self.old_sizes * left.gather(1, self.assignment)
        if self._weights is not None or second._weights is not None:
            per_weight = second._all_weights / self._weight_sums.clamp(min=TINY)
            weights = self._all_weights * per_weight.gather(1, self.assignment)
        return Grouping(assignment, second.counts, second.lengths, sizes, weights, second._given_width)

    def without_prefix(self, prefix: int) -> Self:
        """The same step for the patch tokens alone, where `prefix` tokens come first before and after it."""
        if prefix == 0:
            return self
        sizes, weights = (x if x is None else x[:, prefix:] for x in (self._old_sizes, self._weights))
        assignment = (self.assignment[:, prefix:] - prefix).clamp_(min=0)  # padding may point at a prefix token
        lengths = [length - prefix for length in self.lengths]
        width = None if self._given_width is None else self._given_width - prefix
        return type(self)(assignment, self.counts - prefix, lengths, sizes, weights, width)

    def widened(self, width: int) -> Self:
        """The same step with padding up to `width` groups, so that shapes repeat; M if that is more."""
        given = self.assignment, self.counts, self.lengths, self._old_sizes, self._weights
        return type(self)(*given, max(width, self.width))

    @property
    def old_sizes(self) -> Tensor:
        """(B, N), float32, what the tokens brought along as their size."""
        return torch.ones_like(self.assignment, dtype=torch.float32) if self._old_sizes is None else self._old_sizes

    @property
    def _all_weights(self) -> Tensor:
        """(B, N), float32, what the mean is weighted by."""
        weights = self._mean_weights
        return torch.ones_like(self.assignment, dtype=torch.float32) if weights is None else weights

    @property
    def _mean_weights(self) -> Tensor | None:
        """(B, N), what the mean is weighted by; None: all count 1."""
        return self._old_sizes if self._weights is None else self._weights

    @cached_property
    def _weight_sums(self) -> Tensor:
        """(B, M), float32, the weights of every group together."""
        return self.sizes if self._weights is None else self._group_sums(self._weights)

    def _group_sums(self, values: Tensor | None) -> Tensor:
        """Sum over every group: (B, N) -> (B, M); None: how many it has."""
        if values is None:
            values = torch.ones_like(self.assignment, dtype=torch.float32)
        return values.new_zeros(images_in(self.assignment), self.width).scatter_add_(1, self.assignment, values)

    @cached_property
    def _flat_assignment(self) -> Tensor:
        """(B·N,): the assignment as rows of the flattened (B·M, D) matrix of groups."""
        n_images = images_in(self.assignment)
        if isinstance(n_images, int) and n_images == 1:
            return self.assignment.flatten()
        offsets = torch.arange(n_images, device=self.assignment.device) * self.width
        return (self.assignment + offsets[:, None]).flatten()


def _equal_counts(assignment: Tensor, length: int) -> tuple[Tensor, list[int]]:
    """`counts` and `lengths` where every image has so many groups."""
    n_images = images_in(assignment)
    counts = torch.full((n_images,), length, dtype=torch.int64, device=assignment.device)
    return counts, repeated(length, n_images)


class Chain:
    """Any two reductions, one after the other.

    Args:
        first: from N tokens to some.
        second: from those to M.

    Attributes:
        assignment: (B, N), composed, where both steps have one; reading it raises an AttributeError elsewhere.
    """

    def __init__(self, first: Reduction, second: Reduction) -> None:
        self.first, self.second = first, second

    counts = property(lambda self: self.second.counts)
    lengths = property(lambda self: self.second.lengths)
    padding = property(lambda self: self.second.padding)
    sizes = property(lambda self: self.second.sizes)

    @cached_property
    def assignment(self) -> Tensor:
        first, second = self.first, self.second
        if not (hasattr(first, "assignment") and hasattr(second, "assignment")):
            raise AttributeError("assignment")  # so that hasattr tells
        return second.assignment.gather(1, first.assignment)

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, M, D)."""
        return self.second.merge(self.first.merge(x))

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """y: (B, M, D) -> (B, N, D); by one gather where every position has a token."""
        if hasattr(self, "assignment"):
            return rows(y, self.assignment)
        return self.first.unmerge(self.second.unmerge(y, scores), scores)

    def then(self, third: Reduction) -> "Chain":
        """This chain, one longer."""
        return Chain(self, third)
