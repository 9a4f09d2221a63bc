"""PiToMe: tokens that have much in common with many merge, isolated ones stay."""

from dataclasses import replace
from typing import Any

import g2tm
from patch.method import Step, register
from patch.methods.common import (
    GROUPING,
    KEEP,
    PAPER,
    SCHEDULE,
    compared,
    grouping,
    kept_share,
    r_here,
    r_of_pair,
    variant,
)


@grouping
def _merge(step: Step) -> g2tm.Grouping:
    """Merge the tokens of highest energy, a number of them or all but a share."""
    paper = step.options["variant"] == PAPER
    rule = "bsm" if not paper and g2tm.matches_all(step.layer, step.depth) else "energy"
    margin = g2tm.energy_margin(step.layer, step.depth, paper)
    r = r_here(step) if step.options["keep"] is None else step.x.shape[1] - kept_share(step)
    return g2tm.pitome(compared(step), r=r, margin=margin, variant=rule, paper=paper, **step.given)


def _prepare(given: dict[str, Any]) -> dict[str, Any]:
    """Let sizes count in attention, in the paper's form alone."""
    attention = {"attention": "proportional"} if given.get("variant") == PAPER else {}
    return attention | r_of_pair(given)


register(
    "pitome",
    _merge,
    summary="Tokens that resemble many others merge.",
    variant=variant(
        "Form of the method. code: margin 0.75, half of the layers match all tokens; paper: margin 0.9, its energy "
        "everywhere, sizes count in attention.",
    ),
    keep=replace(
        KEEP,
        default=None,
        help="Share of the patch tokens (0 to 1) that each layer keeps, as in the paper, in place of r.",
        default_text="none, r decides",
    ),
    **GROUPING,
    **SCHEDULE | {"prepare": _prepare},
)
