"""DCT: the lowest frequencies along the sequence of patch tokens."""

import g2tm
from patch.method import Step, register
from patch.methods.common import SCHEDULE, r_here


def _merge(step: Step) -> g2tm.Reduction:
    return g2tm.dct(step.x, r=r_here(step))


register(
    "dct",
    _merge,
    summary="Each layer drops the r highest frequencies of the tokens.",
    place="block",
    **SCHEDULE,
)
