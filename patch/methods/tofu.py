"""ToFu: matched tokens are dropped up to the middle of the network, and merge after it."""

import g2tm
from patch.method import Step, register
from patch.methods.common import SCHEDULE, r_here, variant


def _merge(step: Step) -> g2tm.Reduction:
    rule = {"prune": g2tm.prunes(step.layer, step.depth), "variant": step.options["variant"]}
    return g2tm.tofu(step.keys, r=r_here(step), odd_first=step.odd_first, **rule, **step.given)


register(
    "tofu",
    _merge,
    summary="As tome, but early layers drop the matched tokens.",
    variant=variant("Norm of merged tokens. code: divided by the norm of the target; paper: by that of the mean."),
    **SCHEDULE,
)
