"""LTMP: merges what is similar enough, then prunes what is not important enough."""

from typing import Any

from torch import Tensor

import g2tm
from patch.attention import SoftMasking
from patch.learned import MERGE_THRESHOLD, add_thresholds
from patch.method import LossInput, ModelShape, Option, Options, Step, register
from patch.methods.common import LEARNING, SHARE, TOKENS, check_learned, check_tokens, flops_loss, tokens_left


def _merge(step: Step) -> g2tm.Reduction:
    rule = _rule(step) | {"tokens": tokens_left(step), "batch": step.batch}
    return g2tm.ltmp(step.x, step.keys, **rule, **step.given)


def _soften(step: Step) -> g2tm.Reduction:
    """Mask tokens instead of removing them, so that the thresholds learn what they cost."""
    return g2tm.ltmp_training(step.x, step.keys, mask=step.soft_mask, sizes=step.sizes, **_rule(step))


def _rule(step: Step) -> dict[str, Any]:
    """The importance and both thresholds: numbers where they are given, tensors where they are learned.

    Importance is a share of all attention: with more patches than the model was made for, each has less of it.
    """
    block, options = step.block, step.options
    if options["learned"]:
        merge, prune = (masker.threshold.clamp(0, 1) for masker in (block.merge_masker, block.prune_masker))
    else:
        merge = MERGE_THRESHOLD if options["merge_threshold"] is None else options["merge_threshold"]
        prune = 0.0 if options["prune_threshold"] is None else options["prune_threshold"]
    tokens, made_for = (step.n_prefix + grid[0] * grid[1] for grid in (step.grid, step.native_grid))
    prune = prune * (made_for / tokens)
    return {
        "importance": step.received_attention,
        "merge_threshold": merge,
        "prune_threshold": min(prune, 1.0) if isinstance(prune, float) else prune,
        "odd_first": step.odd_first,
    }


def _loss(trained: LossInput) -> Tensor:
    """The loss of the share that is left of the operations without reduction."""
    steps, n_prefix = trained.steps, trained.n_prefix
    left: list[Any] = [n_prefix + trained.grid[0] * trained.grid[1]]
    for layer in range(1, len(trained.blocks) + 1):
        left.append(n_prefix + steps[layer].mask.sum(1).mean() if layer in steps else left[-1])
    return flops_loss(trained, g2tm.operations_left(left, trained.width))


def _check(options: Options, shape: ModelShape) -> None:
    check_tokens(options, shape)
    check_learned(options, "merge_threshold", "prune_threshold")


register(
    "ltmp",
    _merge,
    summary="Similar tokens merge, unimportant ones are pruned.",
    check=_check,
    modules=add_thresholds,
    training_form=_soften,
    soft_masking=SoftMasking(epsilon=1e-5, keeps_self=False),
    loss=_loss,
    attention="proportional",
    merge_threshold=Option(
        None,
        "Cosine similarity (0 to 1) above which tokens merge; 1: none merge.",
        type=SHARE,
        default_text=str(MERGE_THRESHOLD),
    ),
    prune_threshold=Option(
        None,
        "Share of all attention (0 to 1) up to which a token is pruned, at the image size that the model was made for.",
        type=SHARE,
        default_text="0: none",
    ),
    tokens=TOKENS,
    **LEARNING,
)
