"""MPM: tokens that are each other's most similar token become one."""

import g2tm
from patch.method import Step, register
from patch.methods.common import REPRESENTATIVE, grouping


@grouping
def _merge(step: Step) -> g2tm.Grouping:
    return g2tm.mutual_pairs(step.x, batch=step.batch, **step.given)


register(
    "mpm",
    _merge,
    summary="Tokens that are each other's most similar one merge.",
    place="before",
    layers=(2, 5),
    representative=REPRESENTATIVE,
)
