"""MCTF: similar, little attended, small tokens fuse, in both directions."""

import g2tm
from patch.method import Number, Option, Step, register
from patch.methods.common import SCHEDULE, r_here


def _merge(step: Step) -> g2tm.Reduction:
    """Fuse by the block's input, and by the attention that each token gets."""
    rule = {name: step.options[name] for name in ("tau", "bidirectional")}
    importance = step.received_attention
    return g2tm.mctf(step.input, r=r_here(step), importance=importance, odd_first=step.odd_first, **rule, **step.given)


register(
    "mctf",
    _merge,
    summary="Similar, little attended, small tokens merge.",
    attention="proportional",
    tau=Option(
        (1, 0, 0),
        "Temperatures of similarity, information and size; 0 ignores a criterion; the paper has 1 20 40.",
        type=Number(0),
        many=3,
        flag="--temperatures",
    ),
    bidirectional=Option(
        True,
        "Fuse in both directions, half of the tokens in each, or in one.",
        flag={"--bidirectional": True, "--one-direction": False},
    ),
    **SCHEDULE,
)
