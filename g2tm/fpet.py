"""FPET (CVPR 2025, arXiv 2503.20282): once, half of the patches merge into the other half of a checkerboard."""

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.masked import straight_through
from g2tm.reduction import Chain, Grouping, Reduction
from g2tm.selection import images_in, most_similar, precise, selection
from g2tm.validation import check_grid


@selection
def fpet(metric: Tensor, grid: tuple[int, int], *, sizes: Tensor | None = None, prefix: int = 1) -> Grouping:
    """Merge every patch of even row + column into the most similar one of the others.

    Args:
        metric: (B, P + N, D), what tokens are compared by (cosine); prefix tokens, then the whole grid, row-major.
        grid: (gh, gw) with gh·gw = N.
        sizes: (B, P + N), patches that each token carries; None: one each.
        prefix: P, number of prefix tokens, which take no part.

    Returns:
        A `Grouping` of the whole sequence: prefix tokens; odd rows' even columns; even rows' odd columns.

    Raises:
        ValueError: a grid that does not hold the tokens.
    """
    sources, stay = checkerboard(grid, prefix, metric)
    if not stay.numel() or images_in(metric) == 0:
        return Grouping.identity(metric, sizes)
    unit = F.normalize(precise(metric), dim=-1)
    _, partner = most_similar(unit[:, sources], unit[:, stay])
    position = torch.arange(metric.shape[1], device=metric.device).repeat(images_in(metric), 1)
    target = position.index_copy(1, sources, stay[partner])
    survivors = torch.cat([position[:, :prefix], stay.expand(images_in(metric), -1)], 1)
    return Grouping.of_targets(target, survivors, sizes)


def checkerboard(grid: tuple[int, int], prefix: int, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the patches that leave, row-major, and of those that stay, in the order of the result.

    metric: (B, prefix + gh·gw, D), for its shape and device.
    """
    check_grid(grid, metric.shape[1] - prefix)
    position = prefix + torch.arange(grid[0] * grid[1], device=metric.device).view(grid)
    leaving = torch.cat([position[::2, ::2].flatten(), position[1::2, 1::2].flatten()]).sort().values
    return leaving, torch.cat([position[1::2, ::2].flatten(), position[::2, 1::2].flatten()])


def fpet_training(
    metric: Tensor, grid: tuple[int, int], *, sizes: Tensor | None = None, prefix: int = 1
) -> "StraightThrough | Grouping":
    """`fpet` with a gradient for the metric (section 3.2): the same tokens, matched by `StraightThrough`."""
    step = fpet(metric, grid, sizes=sizes, prefix=prefix)
    sources, stay = checkerboard(grid, prefix, metric)
    if step.width == metric.shape[1]:  # nothing merged
        return step
    with torch.autocast(metric.device.type, enabled=False):
        unit = F.normalize(precise(metric), dim=-1)
        similarity = unit[:, sources] @ unit[:, stay].mT
        best = similarity.topk(min(2, similarity.shape[2]), dim=2).values
        soft = torch.sigmoid(similarity - best.mean(2, keepdim=True))
    return StraightThrough(step, soft, sources, stay)


class StraightThrough:
    """A matching whose gradient is that of a soft one.

    Forward, every source counts for its target alone. Backward, the matching of source i and destination k stands for
    S_ik, so gradients reach the metric through numerator and denominator of every mean.

    Args:
        hard: the matching.
        soft: (B, I, K), S.
        sources, stay: (I,) and (K,), positions of sources and destinations before; the destinations come last, in
            this order, afterwards.

    Attributes:
        assignment, counts, lengths, padding, sizes: those of the hard matching.
    """

    def __init__(self, hard: Grouping, soft: Tensor, sources: Tensor, stay: Tensor) -> None:
        self._hard, self._sources, self._stay = hard, sources, stay
        self._first = hard.width - len(stay)
        one_hot = F.one_hot(hard.assignment[:, sources] - self._first, len(stay)).to(soft.dtype)
        self._matching = straight_through(one_hot, soft)

    assignment = property(lambda self: self._hard.assignment)
    counts = property(lambda self: self._hard.counts)
    lengths = property(lambda self: self._hard.lengths)
    padding = property(lambda self: self._hard.padding)
    sizes = property(lambda self: self._hard.sizes)

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, P + N, D) -> (B, P + M, D), in the dtype of x."""
        with torch.autocast(x.device.type, enabled=False):
            values = precise(x)
            sizes = self._hard.old_sizes.unsqueeze(2).to(values.dtype)
            matching = self._matching.mT.to(values.dtype)
            own, given = sizes[:, self._stay], sizes[:, self._sources]
            sums = own * values[:, self._stay] + matching @ (given * values[:, self._sources])
            merged = sums / (own + matching @ given)
            return torch.cat([values[:, : self._first], merged], 1).to(x.dtype)

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """y: (B, P + M, D) -> (B, P + N, D)"""
        return self._hard.unmerge(y, scores)

    def then(self, second: Reduction) -> Chain:
        """This step followed by `second`."""
        return Chain(self, second)

    def without_prefix(self, prefix: int) -> "StraightThrough":
        """The same step for the patch tokens alone; not more than those in front may be left out."""
        rest = object.__new__(StraightThrough)
        rest._hard, rest._matching = self._hard.without_prefix(prefix), self._matching
        rest._sources, rest._stay = self._sources - prefix, self._stay - prefix
        rest._first = self._first - prefix
        return rest
