"""ATC: agglomerative clusters of a share of the tokens."""

import g2tm
from patch.method import Choice, ModelShape, Option, Step, register
from patch.methods.common import GROUPING, KEEP, compared, grouping, kept_share


@grouping
def _merge(step: Step) -> g2tm.Grouping:
    return g2tm.atc(compared(step), clusters=kept_share(step), linkage=step.options["linkage"], **step.given)


def _layers(shape: ModelShape) -> tuple[int, ...]:
    """Return layers 4, 7 and 10 of 12 (ATC, section 4)."""
    return tuple(sorted({1 + shape.depth * quarter // 4 for quarter in (1, 2, 3)}))


register(
    "atc",
    _merge,
    summary="Agglomerative clusters merge, to a share of the tokens.",
    layers=_layers,
    attention="proportional",
    keep=KEEP,
    linkage=Option("average", "Linkage that defines the distance of two clusters.", type=Choice(g2tm.LINKAGES)),
    **GROUPING,
    static=True,
)
