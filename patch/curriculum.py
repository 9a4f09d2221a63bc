"""Threshold curriculum: training starts with little merging and approaches the final threshold."""

import math
from dataclasses import dataclass

from g2tm import check_threshold

STEP = 0.01


@dataclass(frozen=True)
class Curriculum:
    """Thresholds over epochs: `start` for `warmup` epochs, then 0.01 less every `period` epochs, down to `target`.

    Raises:
        ValueError: a threshold that is no cosine similarity, start below target, or negative times.
    """

    start: float
    target: float
    warmup: int
    period: int

    def __post_init__(self) -> None:
        check_threshold(self.start, "start threshold")
        check_threshold(self.target)
        if self.start < self.target:
            raise ValueError(f"start threshold {self.start} is below the threshold {self.target}: start above it")
        if self.warmup < 0 or self.period < 1:
            raise ValueError(f"curriculum of {self.warmup} + n·{self.period} epochs: give warm-up ≥ 0 and period ≥ 1")

    def threshold(self, epoch: int) -> float:
        """Threshold of an epoch, counted from 0."""
        steps = 0 if epoch < self.warmup else 1 + (epoch - self.warmup) // self.period
        return max(self.target, round(self.start - STEP * steps, 10))

    @property
    def epochs(self) -> int:
        """Epochs after which the target has been trained with for a whole period."""
        steps = math.ceil(round((self.start - self.target) / STEP, 6))  # rounded first: 7.000000000000006 are 7
        return self.warmup + self.period * steps
