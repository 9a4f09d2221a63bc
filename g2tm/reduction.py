"""What one merge step did, and how to go back."""

from functools import cached_property

import torch


class Reduction:
    """Assignment of N tokens to M groups per image, with the two maps that it gives.

    Args:
        assignment: (B, N), int64; for every token the index of its group.
        counts: (B,), int64, number of groups of each image; an image with fewer than M has padding behind them.
        width: M, the largest count.
        sizes: (B, N), how many patches each token carries already; None: one each. Padding carries 0.

    Attributes:
        assignment, counts: as given.
        sizes: (B, M), float32, how many patches each group carries; 0 marks padding.
        padded: whether any image has padding.
    """

    def __init__(self, assignment, counts, width, sizes=None, padded=False):
        self.assignment = assignment
        self.counts = counts
        self.padded = padded
        self._weights = None if sizes is None else sizes.float()
        weights = torch.ones_like(assignment, dtype=torch.float32) if sizes is None else self._weights
        self.sizes = weights.new_zeros(len(assignment), width).scatter_add_(1, assignment, weights)

    @classmethod
    def of_counts(cls, assignment, counts, sizes=None):
        """Reduction to `counts` groups per image; waits for the device once, to learn the largest."""
        fewest, most = count_extremes(counts)
        return cls(assignment, counts, most, sizes, padded=fewest < most)

    @property
    def padding(self):
        """(B, M), bool: True where a slot holds no token; None if no image has padding."""
        if not self.padded:
            return None
        return torch.arange(self.sizes.shape[1], device=self.counts.device) >= self.counts[:, None]

    def merge(self, x):
        """Mean of every group, weighted by the sizes that the tokens brought along; differentiable.

        Args:
            x: (B, N, D).

        Returns:
            (B, M, D), in the dtype of x, summed in at least float32; padding is zero.
        """
        values = x if x.dtype == torch.float64 else x.float()
        if self._weights is not None:
            values = values * self._weights.unsqueeze(-1)
        n_images, width = self.sizes.shape
        total = values.new_zeros(n_images * width, x.shape[-1])
        rows = self._flat_assignment.unsqueeze(-1).expand(-1, x.shape[-1])
        total.scatter_add_(0, rows, values.flatten(0, 1))  # in place: half the time, the same gradient
        mean = total.unflatten(0, (n_images, width)).div_(self.sizes.clamp(min=1).unsqueeze(-1).to(values.dtype))
        return mean.to(x.dtype)

    def unmerge(self, y):
        """Give every token the value of its group: y: (B, M, D) -> (B, N, D)."""
        return y.flatten(0, 1).index_select(0, self._flat_assignment).unflatten(0, self.assignment.shape)

    def then(self, second):
        """This step followed by `second`, which acts on the M groups, seen as one step from N tokens."""
        assignment = second.assignment.gather(1, self.assignment)
        return Reduction(assignment, second.counts, second.sizes.shape[1], self._weights, second.padded)

    def without_prefix(self, prefix):
        """The same step for the patch tokens alone, where `prefix` tokens come first before and after it."""
        weights = None if self._weights is None else self._weights[:, prefix:]
        assignment = (self.assignment[:, prefix:] - prefix).clamp(min=0)  # padding may point at a prefix token
        return Reduction(assignment, self.counts - prefix, self.sizes.shape[1] - prefix, weights, self.padded)

    def widened(self, width):
        """The same step with padding up to `width` groups, so that shapes repeat; M if that is more."""
        return Reduction(self.assignment, self.counts, max(width, self.sizes.shape[1]), self._weights, padded=True)

    @cached_property
    def _flat_assignment(self):
        """(B·N,): the assignment as rows of the flattened (B·M, D) matrix of groups."""
        n_images, width = self.sizes.shape
        offsets = torch.arange(0, n_images * width, width, device=self.assignment.device)
        return (self.assignment + offsets[:, None]).flatten()


def count_extremes(counts):
    """(smallest, largest) of (B,) counts, as numbers, in one wait for the device."""
    if len(counts) == 1:
        return (counts.item(),) * 2
    return tuple(torch.stack(torch.aminmax(counts)).tolist())
