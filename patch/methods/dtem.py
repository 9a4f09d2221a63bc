"""DTEM: ToMe by a learned embedding of the input of each block's attention."""

from torch import Tensor

import g2tm
from patch.learned import add_embeddings
from patch.method import Step, register
from patch.methods.common import PAPER, SCHEDULE, r_here, variant


def _merge(step: Step) -> g2tm.Reduction:
    return g2tm.bipartite(_metric(step), r=r_here(step), odd_first=step.odd_first, **step.given)


def _soften(step: Step) -> g2tm.Reduction:
    """Keep all tokens; those that merge fade out by their size."""
    metric, paper = _metric(step), step.options["variant"] == PAPER
    sizes = metric.new_ones(metric.shape[:2]) if step.sizes is None else step.sizes
    live = step.x.shape[1]
    for layer in step.options["layers"]:
        r = min(r_here(step, layer), live // 2)
        if layer == step.layer:
            break
        live -= r
    a_index, b_index = g2tm.split(sizes.detach(), live, random=not paper)
    sharpness = 10.0 if paper else 30.0
    halves = {"a_index": a_index, "b_index": b_index}
    return g2tm.soft_merge(metric, r=r, inverse_temperature=sharpness, sizes=sizes, **halves)


def _metric(step: Step) -> Tensor:
    """(B, N, d), the embedding of the patch tokens."""
    layer = step.block.attn.qkv.metric_layer
    share = 0.0 if step.options["variant"] == PAPER else 0.1
    return g2tm.embed(step.normed, layer.weight, layer.bias, share)


register(
    "dtem",
    _merge,
    summary="As tome, by a learned embedding instead of the keys.",
    modules=add_embeddings,
    training_form=_soften,
    attention="proportional",
    variant=variant(
        "Form of the training. code: random halves, 1/temperature 30, a tenth of the gradient into features; paper: "
        "halves by position, 10, none.",
    ),
    **SCHEDULE,
)
