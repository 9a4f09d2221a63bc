"""FPET (CVPR 2025, arXiv 2503.20282): once, half of the patches merge into the other half of a checkerboard."""

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.masked import straight_through
from g2tm.reduction import Grouping, Reduction
from g2tm.selection import at_least_float32, images_in, own_positions, selection, without_autocast
from g2tm.similarity import exact_product, most_similar, unit_vectors
from g2tm.validation import check_grid


@selection
def fpet(metric: Tensor, grid: tuple[int, int], *, sizes: Tensor | None = None) -> Grouping:
    """Merge every patch of even row + column into the most similar one of the others.

    The order is: odd rows' even columns, then even rows' odd columns. metric, grid, sizes: see `g2tm`.
    """
    sources, stay = checkerboard(grid, metric)
    if not stay.numel() or images_in(metric) == 0:
        return Grouping.identity(metric, sizes)
    unit = unit_vectors(metric)
    _, partner = most_similar(unit[:, sources], unit[:, stay])
    target = own_positions(metric).index_copy(1, sources, stay[partner])
    return Grouping.of_targets(target, stay.expand(images_in(metric), -1), sizes)


def checkerboard(grid: tuple[int, int], metric: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the patches that leave, row-major, and of those that stay, in the order of the result."""
    check_grid(grid, metric.shape[1])
    position = torch.arange(grid[0] * grid[1], device=metric.device).view(grid)
    leaving = torch.cat([position[::2, ::2].flatten(), position[1::2, 1::2].flatten()]).sort().values
    return leaving, torch.cat([position[1::2, ::2].flatten(), position[::2, 1::2].flatten()])


def fpet_training(
    metric: Tensor, grid: tuple[int, int], *, sizes: Tensor | None = None
) -> "StraightThrough | Grouping":
    """`fpet` with a gradient for the metric (section 3.2): the same tokens, matched by `StraightThrough`."""
    step = fpet(metric, grid, sizes=sizes)
    if step.width == metric.shape[1]:  # nothing merged
        return step
    sources, stay = checkerboard(grid, metric)
    with without_autocast(metric):
        unit = unit_vectors(metric)
        similarity = exact_product(unit[:, sources], unit[:, stay].mT)
        best = similarity.topk(min(2, similarity.shape[2]), dim=2).values
        soft = torch.sigmoid(similarity - best.mean(2, keepdim=True))
    return StraightThrough(step, soft, sources, stay)


class StraightThrough(Reduction):
    """A matching whose gradient is that of a soft one.

    Forward, every source counts for its target alone. Backward, the matching of source i and destination k stands for
    S_ik, so gradients reach the metric through numerator and denominator of every mean.

    Args:
        hard: the matching.
        soft: (B, I, K), S.
        sources, stay: (I,) and (K,), positions of sources and destinations; the latter are left, in this order.
    """

    def __init__(self, hard: Grouping, soft: Tensor, sources: Tensor, stay: Tensor) -> None:
        self.assignment, self.counts, self.lengths, self.sizes = hard.assignment, hard.counts, hard.lengths, hard.sizes
        self._old_sizes, self._sources, self._stay = hard.old_sizes, sources, stay
        self._matching = straight_through(F.one_hot(hard.assignment[:, sources], len(stay)).to(soft.dtype), soft)

    def merge(self, x: Tensor) -> Tensor:
        with without_autocast(x):
            values = at_least_float32(x)
            sizes = self._old_sizes.unsqueeze(2).to(values.dtype)
            matching = self._matching.mT.to(values.dtype)
            own, given = sizes[:, self._stay], sizes[:, self._sources]
            sums = own * values[:, self._stay] + matching @ (given * values[:, self._sources])
            return (sums / (own + matching @ given)).to(x.dtype)
