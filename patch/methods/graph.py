"""G2TM: once, connected components of similar neighboring patches become one token."""

from dataclasses import replace

import g2tm
from g2tm.components import BACKENDS
from patch.method import Choice, ModelShape, Option, Options, Step, register
from patch.methods.common import GROUPING, THRESHOLD, TOKENS, check_tokens, compared, grouping, tokens_left


@grouping
def _merge(step: Step) -> g2tm.Grouping:
    rule = {"threshold": step.options["threshold"], "tokens": tokens_left(step), "backend": step.options["backend"]}
    return g2tm.graph_merge(compared(step), step.grid, batch=step.batch, **rule, **step.given)


def _check(options: Options, shape: ModelShape) -> None:
    if len(options["layers"]) != 1:
        raise ValueError(f"graph merges once: give one layer, not {list(options['layers'])}")
    check_tokens(options, shape)


register(
    "graph",
    _merge,
    summary="G2TM: similar neighboring patches merge, once, early.",
    check=_check,
    layers=(2,),
    threshold=THRESHOLD,
    tokens=TOKENS,
    **GROUPING | {"metric": replace(GROUPING["metric"], default="tokens")},
    backend=Option("auto", "Library that finds the components; auto: by device.", type=Choice(("auto", *BACKENDS))),
)
