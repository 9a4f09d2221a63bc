"""ToMe: the most similar keys merge, a fixed number in every layer."""

import g2tm
from patch.method import Step, register
from patch.methods.common import GROUPING, SCHEDULE, compared, grouping, r_here


@grouping
def _merge(step: Step) -> g2tm.Grouping:
    return g2tm.bipartite(compared(step), r=r_here(step), odd_first=step.odd_first, **step.given)


register(
    "tome",
    _merge,
    summary="ToMe: the r most similar tokens merge in every layer.",
    attention="proportional",
    **GROUPING,
    **SCHEDULE,
)
