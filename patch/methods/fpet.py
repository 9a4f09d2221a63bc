"""FPET: half of a checkerboard merges into the other half."""

from torch import Tensor

import g2tm
from patch.learned import add_adapters
from patch.method import ModelShape, Option, Options, Step, register


def _merge(step: Step) -> g2tm.Reduction:
    return g2tm.fpet(_metric(step), step.grid, sizes=step.sizes)


def _soften(step: Step) -> g2tm.Reduction:
    """Merge the same tokens, with a gradient for the metric."""
    return g2tm.fpet_training(_metric(step), step.grid, sizes=step.sizes)


def _metric(step: Step) -> Tensor:
    """(B, N, d), keys of the patch tokens; refined by the adapter, where there is one."""
    keys = step.keys
    return keys.detach() + step.block.metric_adapter(keys) if step.options["adapter"] else keys


def _check(options: Options, shape: ModelShape) -> None:
    if len(options["layers"]) != 1:
        raise ValueError(f"fpet merges once, it needs the whole grid: give one layer, not {list(options['layers'])}")


register(
    "fpet",
    _merge,
    summary="One half of a checkerboard merges into the other, once.",
    check=_check,
    modules=add_adapters,
    enabled_by="adapter",
    training_form=_soften,
    layers=lambda shape: (shape.depth // 2 + 1,),
    adapter=Option(
        False,
        "Refine the keys by a learned bottleneck before tokens are compared.",
        flag={"--adapter": True, "--no-adapter": False},
    ),
    static=True,
)
