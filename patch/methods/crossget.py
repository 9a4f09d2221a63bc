"""CrossGET, vision side: sources and destinations among all pairs."""

import g2tm
from patch.method import Step, register
from patch.methods.common import SCHEDULE, r_here


def _merge(step: Step) -> g2tm.Reduction:
    return g2tm.crossget(step.keys, r=r_here(step), **step.given)


register(
    "crossget",
    _merge,
    summary="As tome, but any token may merge into any other.",
    attention="proportional",
    **SCHEDULE,
)
