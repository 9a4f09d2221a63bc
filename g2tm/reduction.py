"""The record of a reduction step, and the way back: the base class, reductions by assignment, and chains."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.selection import at_least_float32, cached, images_in, or_ones, own_positions, rows, same_for_all, tokens_in

TINY = torch.finfo(torch.float32).tiny

P = ParamSpec("P")


class Reduction(ABC):
    """From N tokens to M in every image of a batch, and back.

    Attributes:
        counts: (B,), int64, how many tokens each image keeps; an image with fewer than M has padding.
        lengths: the counts as B numbers, known without asking the device.
        grid: (h, w), where the M tokens are a smaller grid of the image, in row-major order; None: they are not.
    """

    counts: Tensor
    lengths: tuple[int, ...]
    grid: tuple[int, int] | None = None

    @cached
    def sizes(self) -> Tensor:
        """(B, M), float32, the size of every token in attention and statistics; 0 in the padding."""
        raise NotImplementedError

    @cached
    def padding(self) -> Tensor | None:
        """(B, M), bool, True where a slot holds no token; None: no image has any."""
        return None

    @cached
    def assignment(self) -> Tensor:
        """(B, N), int64, for every token the index of the one that carries it.

        A reduction whose tokens are no groups of others does not have this attribute, and `hasattr` tells.
        """
        raise AttributeError("assignment")

    @abstractmethod
    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, M, D), in the dtype of x; differentiable."""

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """Give every position its token back: y: (B, M, D) -> (B, N, D).

        scores: the values do not share the scale of the residual stream (class logits, normalized features): a
        constant then stays a constant also where a linear transform would scale it.
        """
        return rows(y, self.assignment)

    def then(self, second: "Reduction") -> "Reduction":
        """This step followed by `second`, which acts on the M tokens, seen as one step from N."""
        return Chain(self, second)

    @property
    def width(self) -> int:
        """M"""
        return max(self.lengths) if self.lengths else int(self.sizes.shape[1])

    def detached(self) -> Self:
        """A copy whose tensors, also those of the reductions that it holds, are cut from their autograd graph."""
        copied = object.__new__(type(self))
        vars(copied).update({name: _detached(value) for name, value in vars(self).items()})
        return copied


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor | Reduction):
        return value.detach() if isinstance(value, Tensor) else value.detached()
    return type(value)(map(_detached, value)) if isinstance(value, tuple | list) else value


def equal_counts(like: Tensor, length: int) -> tuple[Tensor, tuple[int, ...]]:
    """`counts` and `lengths` where every image keeps so many tokens; like: (B, ...), on their device."""
    n_images = images_in(like)
    counts = torch.full((n_images,), length, dtype=torch.int64, device=like.device)
    return counts, tuple(same_for_all(length, n_images))


class Grouping(Reduction):
    """Reduction by assignment: N tokens to M groups per image. The size of a group is the sum of its tokens'.

    Args:
        assignment, counts, lengths: see `Reduction`; of every token the group, and of every image the number of groups.
        sizes: (B, N), see `g2tm`; padding has 0.
        weights: (B, N), how much each token counts in the mean of its group; 0: it is carried along (pruning). None:
            its size.
        width: M, at least the largest count, which it is for None. With a given width the images count as padded.
        padding: (B, M), bool, with a given width: the slots that hold no token; None: those behind the counts.
    """

    def __init__(
        self,
        assignment: Tensor,
        counts: Tensor,
        lengths: Sequence[int],
        sizes: Tensor | None = None,
        weights: Tensor | None = None,
        width: int | None = None,
        padding: Tensor | None = None,
    ) -> None:
        self.assignment, self.counts, self.lengths = assignment, counts, tuple(lengths)
        self._given_width, self._given_padding = width, padding
        self._old_sizes = None if sizes is None else sizes.float()
        self._weights = None if weights is None else weights.float()

    @classmethod
    def of_counts(
        cls, assignment: Tensor, counts: Tensor, sizes: Tensor | None = None, padding: Tensor | None = None
    ) -> Self:
        """Reduction to `counts` groups per image; waits for the device once, to learn them.

        padding: (B, N), see `g2tm`, of the tokens before the step: `assignment` need not say where it goes.
        """
        if padding is not None:
            assignment = assignment.masked_fill(padding, 0)
            sizes = or_ones(sizes, padding).masked_fill(padding, 0)
        if torch.compiler.is_exporting():
            longest = torch.sym_int(counts.max().item())  # stays a symbol
            torch._check(longest <= assignment.shape[1])
            return cls(assignment, counts, same_for_all(longest, 1), sizes, width=longest)
        return cls(assignment, counts, counts.tolist(), sizes)

    @classmethod
    def of_length(cls, assignment: Tensor, length: int, sizes: Tensor | None = None) -> Self:
        """Reduction to `length` groups in every image; nothing to wait for."""
        return cls(assignment, *equal_counts(assignment, length), sizes)

    @classmethod
    def of_targets(
        cls, target: Tensor, survivors: Tensor, sizes: Tensor | None = None, weights: Tensor | None = None
    ) -> Self:
        """Reduction to the survivors, (B, M), positions in the order of the result; nothing to wait for.

        target: (B, N), for every token the position of the survivor that carries it.
        """
        order = torch.arange(survivors.shape[1], device=target.device).expand_as(survivors)
        assignment = torch.zeros_like(target).scatter_(1, survivors, order).gather(1, target)
        return cls(assignment, *equal_counts(assignment, survivors.shape[1]), sizes, weights)

    @classmethod
    def identity(cls, x: Tensor, sizes: Tensor | None = None, padding: Tensor | None = None) -> Self:
        """The step that merges none of the tokens x, (B, N, D); padding, (B, N), bool, comes last and stays."""
        assignment = own_positions(x)
        if padding is None:
            return cls.of_length(assignment, assignment.shape[1], sizes)
        return cls.of_counts(assignment, tokens_in(x, padding), sizes, padding)

    @cached
    def sizes(self) -> Tensor:
        return self._group_sums(self.old_sizes)

    @property
    def width(self) -> int:
        if self._given_width is not None:
            return self._given_width
        return max(self.lengths, default=self.assignment.shape[1])

    @cached
    def padding(self) -> Tensor | None:
        if self._given_padding is not None:
            return self._given_padding
        if self._given_width is None and min(self.lengths, default=self.width) == self.width:
            return None
        return torch.arange(self.width, device=self.counts.device) >= self.counts[:, None]

    def merge(self, x: Tensor) -> Tensor:
        """Weighted mean of every group, summed in at least float32: (B, N, D) -> (B, M, D); padding is zero."""
        values = at_least_float32(x)
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
        """As the base class, by rows of the whole batch; `scores` makes no difference."""
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
            per_weight = second.all_weights / self._weight_sums.clamp(min=TINY)
            weights = self.all_weights * per_weight.gather(1, self.assignment)
        return Grouping(
            assignment, second.counts, second.lengths, sizes, weights, second._given_width, second._given_padding
        )

    def widened(self, width: int) -> Self:
        """The same step with padding up to `width` groups, so that shapes repeat; M if that is more."""
        wide, width = object.__new__(type(self)), max(width, self.width)
        computed = "sizes", "padding", "_weight_sums", "_flat_assignment"  # anew, for this width
        vars(wide).update({name: value for name, value in vars(self).items() if name not in computed})
        wide._given_width = width
        if self._given_padding is not None:
            wide._given_padding = F.pad(self._given_padding, (0, width - self.width), value=True)
        return wide

    def weighted(self, weights: Tensor) -> Self:
        """The same groups with other weights, (B, N), in their means."""
        other = object.__new__(type(self))
        vars(other).update({name: value for name, value in vars(self).items() if name != "_weight_sums"})
        other._weights = weights.float()
        return other

    @property
    def old_sizes(self) -> Tensor:
        """(B, N), float32, the sizes that the tokens brought along."""
        return or_ones(self._old_sizes, self.assignment)

    @property
    def all_weights(self) -> Tensor:
        """(B, N), float32, the weights of the tokens in the means."""
        return or_ones(self._mean_weights, self.assignment)

    @property
    def _mean_weights(self) -> Tensor | None:
        """As `all_weights`; None: all count 1."""
        return self._old_sizes if self._weights is None else self._weights

    @cached
    def _weight_sums(self) -> Tensor:
        """(B, M), float32, the weights of every group together."""
        return self.sizes if self._weights is None else self._group_sums(self._weights)

    def _group_sums(self, values: Tensor) -> Tensor:
        """Sum over every group: (B, N) -> (B, M)."""
        return values.new_zeros(images_in(self.assignment), self.width).scatter_add_(1, self.assignment, values)

    @cached
    def _flat_assignment(self) -> Tensor:
        """(B·N,): the assignment as rows of the flattened (B·M, D) matrix of groups."""
        n_images = images_in(self.assignment)
        if isinstance(n_images, int) and n_images == 1:
            return self.assignment.flatten()
        offsets = torch.arange(n_images, device=self.assignment.device) * self.width
        return (self.assignment + offsets[:, None]).flatten()


class Chain(Reduction):
    """Two reductions, one after the other; it has an assignment where both have one."""

    def __init__(self, first: Reduction, second: Reduction) -> None:
        self.first, self.second = first, second
        self.counts, self.lengths, self.grid = second.counts, second.lengths, getattr(second, "grid", None)

    @cached
    def sizes(self) -> Tensor:
        return self.second.sizes

    @cached
    def padding(self) -> Tensor | None:
        return self.second.padding

    @property
    def width(self) -> int:
        return self.second.width

    @cached
    def assignment(self) -> Tensor:
        return self.second.assignment.gather(1, self.first.assignment)

    def merge(self, x: Tensor) -> Tensor:
        return self.second.merge(self.first.merge(x))

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """y: (B, M, D) -> (B, N, D); by one gather where every position has a token."""
        if hasattr(self, "assignment"):
            return rows(y, self.assignment)
        return self.first.unmerge(self.second.unmerge(y, scores), scores)


def one_by_one(merge: Callable[P, Grouping]) -> Callable[P, Grouping]:
    """Decorator that takes over the `padding` of a method that knows none: padded images are reduced one by one.

    Every tensor (B, N, ...) is cut to the tokens of one image; the results are padded to the longest.
    """

    @wraps(merge)
    def reduce(*args: Any, **given: Any) -> Grouping:
        padding = given.pop("padding", None)
        if padding is None or not len(padding):
            return merge(*args, **given)
        lengths = (~padding).sum(1).tolist()

        def own(value: Any, image: int) -> Any:
            is_batch = isinstance(value, Tensor) and value.shape[:2] == padding.shape
            return value[image : image + 1, : lengths[image]] if is_batch else value

        def batch(rows: tuple[Tensor, ...]) -> Tensor:
            return torch.cat([F.pad(row, (0, padding.shape[1] - row.shape[1])) for row in rows])

        steps = [
            merge(*(own(value, image) for value in args), **{name: own(value, image) for name, value in given.items()})
            for image in range(len(lengths))
        ]
        parts = zip(*((step.assignment, step.old_sizes, step.all_weights) for step in steps), strict=True)
        assignment, sizes, weights = map(batch, parts)
        counts, widths = torch.cat([step.counts for step in steps]), [step.width for step in steps]
        return type(steps[0])(assignment, counts, widths, sizes, weights, width=max(*widths, 1))

    return reduce
