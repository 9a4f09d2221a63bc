"""What one merge step did, and how to go back."""

from functools import cached_property

import torch


class Reduction:
    """Assignment of N tokens to M groups per image, with the two maps that it gives.

    Args:
        assignment: (B, N), int64; for every token the index of its group.
        counts: (B,), int64, number of groups of each image; an image with fewer than M has padding behind them.
        lengths: the counts as B numbers, so that nobody has to wait for the device again.
        sizes: (B, N), how many patches each token carries already; None: one each. Padding carries 0.
        width: M, at least the largest count, which it is for None.

    Attributes:
        assignment, counts, lengths: as given.
        width: M.
        sizes: (B, M), float32, how many patches each group carries; 0 marks padding.
        padded: whether images have padding; with a given width they count as padded even if it is the largest count.
    """

    def __init__(self, assignment, counts, lengths, sizes=None, width=None):
        self.assignment = assignment
        self.counts = counts
        self.lengths = tuple(lengths)
        self.width = max(self.lengths) if width is None else width
        self.padded = width is not None or min(self.lengths) < self.width
        self._given_width = width
        self._weights = None if sizes is None else sizes.float()

    @classmethod
    def of_counts(cls, assignment, counts, sizes=None):
        """Reduction to `counts` groups per image; waits for the device once, to learn them."""
        return cls(assignment, counts, counts.tolist(), sizes)

    @cached_property
    def sizes(self):
        weights = self._weights
        if weights is None:
            weights = torch.ones_like(self.assignment, dtype=torch.float32)
        return weights.new_zeros(len(self.assignment), self.width).scatter_add_(1, self.assignment, weights)

    @property
    def padding(self):
        """(B, M), bool: True where a slot holds no token; None if no image has padding."""
        if not self.padded:
            return None
        return torch.arange(self.width, device=self.counts.device) >= self.counts[:, None]

    def merge(self, x):
        """Mean of every group, weighted by the sizes that the tokens brought along; differentiable.

        Args:
            x: (B, N, D).

        Returns:
            (B, M, D), in the dtype of x, summed in at least float32; padding is zero.
        """
        values = x if x.dtype == torch.float64 else x.float()
        sizes = self.sizes.to(values.dtype).clamp(min=1)
        if self._weights is not None:  # each token's share of its group
            values = values * (self._weights / sizes.gather(1, self.assignment)).unsqueeze(-1)
        total = values.new_zeros(len(x) * self.width, x.shape[-1])
        rows = self._flat_assignment.unsqueeze(-1).expand(-1, x.shape[-1])
        total.scatter_add_(0, rows, values.flatten(0, 1))  # in place: half the time, the same gradient
        total = total.unflatten(0, (len(x), self.width))
        mean = total.div_(sizes.unsqueeze(-1)) if self._weights is None else total
        return mean.to(x.dtype)

    def unmerge(self, y):
        """Give every token the value of its group: y: (B, M, D) -> (B, N, D)."""
        return y.flatten(0, 1).index_select(0, self._flat_assignment).unflatten(0, self.assignment.shape)

    def then(self, second):
        """This step followed by `second`, which acts on the M groups, seen as one step from N tokens."""
        assignment = second.assignment.gather(1, self.assignment)
        return Reduction(assignment, second.counts, second.lengths, self._weights, second._given_width)

    def without_prefix(self, prefix):
        """The same step for the patch tokens alone, where `prefix` tokens come first before and after it."""
        weights = None if self._weights is None else self._weights[:, prefix:]
        assignment = (self.assignment[:, prefix:] - prefix).clamp_(min=0)  # padding may point at a prefix token
        lengths = [length - prefix for length in self.lengths]
        width = None if self._given_width is None else self._given_width - prefix
        return Reduction(assignment, self.counts - prefix, lengths, weights, width)

    def widened(self, width):
        """The same step with padding up to `width` groups, so that shapes repeat; M if that is more."""
        return Reduction(self.assignment, self.counts, self.lengths, self._weights, max(width, self.width))

    @cached_property
    def _flat_assignment(self):
        """(B·N,): the assignment as rows of the flattened (B·M, D) matrix of groups."""
        if len(self.assignment) == 1:
            return self.assignment.flatten()
        offsets = torch.arange(0, len(self.assignment) * self.width, self.width, device=self.assignment.device)
        return (self.assignment + offsets[:, None]).flatten()
