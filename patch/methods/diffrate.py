"""DiffRate: the least attended tokens leave, the next ones merge; how many is given or learned."""

from dataclasses import replace
from typing import Any

from torch import Tensor

import g2tm
from patch.attention import SoftMasking
from patch.learned import add_rates
from patch.method import LossInput, ModelShape, Number, Option, Options, Step, register
from patch.methods.common import DEFAULT_R, LEARNING, POSITIVE, SCHEDULE, check_learned, check_r, flops_loss, r_here

COUNTS = ("prune_kept", "merge_kept")
R: Option = SCHEDULE["r"]


def _merge(step: Step) -> g2tm.Reduction:
    kept, merged = _counts(step)
    return g2tm.diffrate(step.x, importance=step.cls_attention, kept=kept, merged=merged, **step.given)


def _counts(step: Step) -> tuple[int, int]:
    """Patch tokens that pruning leaves, and that merging leaves of these."""
    options, n_tokens = step.options, step.x.shape[1]
    if options["learned"]:
        return step.block.prune_ddp.kept, step.block.merge_ddp.kept
    if all(options[name] is None for name in COUNTS):
        return n_tokens, n_tokens - min(r_here(step), n_tokens // 2)
    index = options["layers"].index(step.layer)
    kept, merged = (n_tokens if options[name] is None else options[name][index] - step.n_prefix for name in COUNTS)
    if min(kept, merged) < 1:
        raise ValueError(f"layer {step.layer}: keep the {step.n_prefix} prefix tokens and at least one patch")
    return kept, merged


def _soften(step: Step) -> g2tm.Reduction:
    """Mask tokens instead of removing them, so that the rates learn what they cost."""
    rates = step.block.prune_ddp, step.block.merge_ddp
    prune, merge = ((rate.selected_probability, rate.kept_token_candidate) for rate in rates)
    tokens: dict[str, Any] = {"importance": step.cls_attention, "mask": step.soft_mask, "sizes": step.sizes}
    return g2tm.diffrate_training(step.x, prune=prune, merge=merge, **tokens)


def _loss(trained: LossInput) -> Tensor:
    """The loss of the share that is left of the operations without reduction."""
    length = trained.n_prefix + trained.grid[0] * trained.grid[1]
    everyone = [length] * len(trained.blocks)
    prune, merge = list[Any](everyone), list[Any](everyone)
    for layer in trained.steps:
        block = trained.blocks[layer - 1]
        prune[layer - 1], merge[layer - 1] = block.prune_ddp(trained.n_prefix), block.merge_ddp(trained.n_prefix)
    model = {"length": length, "width": trained.width}
    return flops_loss(trained, g2tm.gigaflops(prune, merge, **model) / g2tm.gigaflops(everyone, everyone, **model))


def _check(options: Options, shape: ModelShape) -> None:
    check_r(options, shape)
    check_learned(options, "r", *COUNTS)
    n_layers = len(options["layers"])
    for name in COUNTS:
        counts = options[name]
        if counts is not None and not (isinstance(counts, list) and len(counts) == n_layers):
            raise ValueError(f"{name} {counts}: give one number for each of the {n_layers} layers")


def _kept_after(what: str) -> Option:
    meaning = f"Tokens, CLS included, that each layer keeps after {what}; instead of --r."
    return Option(None, meaning, type=Number(2, integer=True), many=True, default_text="none, --r decides")


register(
    "diffrate",
    _merge,
    summary="Rarely attended tokens are pruned, then others merge.",
    needs_cls=True,
    modules=add_rates,
    training_form=_soften,
    soft_masking=SoftMasking(epsilon=1e-6, keeps_self=True),
    loss=_loss,
    attention="proportional",
    prune_kept=_kept_after("pruning"),
    merge_kept=_kept_after("merging"),
    granularity=Option(4, "Number of patch tokens from one candidate of a learned rate to the next.", type=POSITIVE),
    **LEARNING | {"flops_weight": replace(LEARNING["flops_weight"], default=100.0)},
    **SCHEDULE | {"check": _check, "r": replace(R, default=None, default_text=str(DEFAULT_R))},
)
