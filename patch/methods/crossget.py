"""CrossGET, vision side: sources and destinations among all pairs."""

import g2tm
from patch.method import Step, register
from patch.methods.common import GROUPING, SCHEDULE, compared, grouping, r_here


@grouping
def _merge(step: Step) -> g2tm.Grouping:
    return g2tm.crossget(compared(step), r=r_here(step), **step.given)


register(
    "crossget",
    _merge,
    summary="As tome, but any token may merge into any other.",
    attention="proportional",
    **GROUPING,
    **SCHEDULE,
)
