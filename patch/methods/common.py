"""The shared part of the methods' entries: options, budgets, and numbers of removed tokens per layer."""

from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral
from typing import Any

from torch import Tensor

from g2tm import Grouping, budget, random_members
from patch.method import HALVES, Choice, LossInput, ModelShape, Number, Option, Options, Step

CODE, PAPER = "code", "paper"
MEAN, RANDOM = "mean", "random"
COUNT, POSITIVE, SHARE = Number(0, integer=True), Number(1, integer=True), Number(0, 1)
THRESHOLD = Option(
    0.88,
    "Cosine similarity (-1 to 1) above which tokens may merge; auto: from a model without merging, only in training.",
    type=Number(-1, 1, read=("auto",)),
)
TOKENS = Option(
    None,
    "Patch tokens that are left after each merging layer, instead of a threshold: a number or a share (0 to 1); or "
    "one for each of these layers.",
    type=Number(0, integer=None),
    many=True,
    default_text="none, the threshold decides",
)
KEEP = Option(0.5, "Share of the patch tokens (0 to 1) that each merging layer keeps.", type=SHARE, flag="--keep-rate")
RESTORE_AT = Option(
    "decoder",
    "Place where every patch gets its token back: after the block of this number (from 1), before_norm or after_norm: "
    "before or after the last norm of the encoder, decoder: after the decoder, or none: the map of the decoder is "
    "enlarged.",
    type=Number(1, integer=True, words=("before_norm", "after_norm", "decoder", "none")),
)
METRICS = ("keys", "queries", "values", "tokens")
REPRESENTATIVE = Option(
    MEAN,
    "Token of a group: the mean weighted by sizes, or a random one of them, the same in every call.",
    type=Choice((MEAN, RANDOM)),
)
# Of methods that compare tokens within a block, and merge groups of them; ALGM, tables 6 and 10.
GROUPING: dict[str, Any] = {
    "metric": Option(
        "keys",
        "Vectors whose cosine similarity chooses what merges: of the layer's attention, or the tokens themselves.",
        type=Choice(METRICS),
    ),
    "after": Option(
        "attention", "Half of the layer after which tokens merge.", type=Choice(HALVES), flag="--merge-after"
    ),
    "representative": REPRESENTATIVE,
}
DEFAULT_R = 8


def variant(differences: str) -> Option:
    """The option of a method whose published code and paper differ."""
    return Option(CODE, differences, type=Choice((CODE, PAPER)))


def compared(step: Step) -> Tensor:
    """The vectors that the option `metric` names, (B, N, d)."""
    name = step.options["metric"]
    return step.x if name == "tokens" else getattr(step, name)


def grouping(merge: Callable[[Step], Grouping]) -> Callable[[Step], Grouping]:
    """Decorator of a method with the option `representative`."""

    @wraps(merge)
    def represented(step: Step) -> Grouping:
        groups = merge(step)
        return groups if step.options["representative"] == MEAN else random_members(groups, seed=step.layer)

    return represented


def kept_share(step: Step) -> int:
    """Number of patch tokens that the share `keep` leaves, at least one."""
    return max(int(step.options["keep"] * step.x.shape[1]), 1)


def tokens_left(step: Step) -> int | None:
    """The budget of this layer; None: the threshold decides."""
    tokens = step.options["tokens"]
    if isinstance(tokens, Sequence):
        tokens = tokens[step.options["layers"].index(step.layer)]
    return None if tokens is None else budget(tokens, step.grid[0] * step.grid[1])


def check_tokens(options: Options, shape: ModelShape) -> None:
    """Raise a ValueError for budgets that do not fit the layers or the patches."""
    tokens, n_layers = options["tokens"], len(options["layers"])
    if isinstance(tokens, Sequence) and len(tokens) != n_layers:
        raise ValueError(f"tokens {tokens}: give one number, or one for each of the {n_layers} merging layers")
    for one in tokens if isinstance(tokens, Sequence) else [tokens]:
        if one is not None:
            budget(one, shape.grid[0] * shape.grid[1])


def check_restore_at(options: Options, shape: ModelShape, first: int) -> None:
    """Raise a ValueError if patches would have their tokens back before `first`, the block of the last merge."""
    at = options["restore_at"]
    if isinstance(at, int) and not first <= at <= shape.depth:
        raise ValueError(f"restore_at {at}: give the number of a block from {first} to {shape.depth}, or a word")


def r_of_pair(given: dict[str, Any]) -> dict[str, Any]:
    """`r=(8, 0.5)` stands for r=8 with r_inflection=0.5; any other tuple is a list with one number per layer."""
    r = given.get("r")
    if not isinstance(r, tuple):
        return given
    if len(r) == 2 and (not isinstance(r[1], Integral) or int(r[1]) in (-1, 0, 1)):
        return given | {"r": r[0], "r_inflection": r[1]}
    return given | {"r": [*r]}


def check_r(options: Options, shape: ModelShape) -> None:
    """Raise a ValueError for a list that does not fit the layers, or that has an inflection besides."""
    r = options["r"]
    if isinstance(r, Sequence) and options["r_inflection"] is not None:
        raise ValueError(f"r {r}: an inflection goes with one number for all layers")
    if isinstance(r, Sequence) and len(r) != shape.depth:
        raise ValueError(f"r {r}: give one number from 0 for each of the {shape.depth} layers")


def scheduled_r(r: int | Sequence[int], inflection: float | None, layer: int, depth: int) -> int:
    """Tokens that a layer removes (ToMe, section 3 and appendix).

    Args:
        r: the same in every layer, or one number per layer.
        inflection: f: layer l (from 0) removes int(lo + (hi - lo)·l/(depth - 1)), lo = int(r·(1 - f)), hi = 2r - lo.
        layer: 1-based.
        depth: number of layers.
    """
    if isinstance(r, Sequence):
        return r[layer - 1]
    if inflection is None:
        return r
    low = int(r * (1 - inflection))
    high = 2 * r - low
    return int(low + (high - low) * (layer - 1) / max(depth - 1, 1))


def r_here(step: Step, layer: int | None = None) -> int:
    """Tokens that this layer removes, or another one."""
    r, layer = step.options["r"], step.layer if layer is None else layer
    return scheduled_r(DEFAULT_R if r is None else r, step.options["r_inflection"], layer, step.depth)


def check_learned(options: Options, *others: str) -> None:
    """Raise a ValueError where some of the other options are given, though learned values are used."""
    given = [name for name in others if options[name] is not None]
    if options["learned"] and given:
        raise ValueError(f"{', '.join(given)}: learned values are used in its place; give --not-learned as well")


def flops_loss(trained: LossInput, share: Tensor) -> Tensor:
    """The weighted squared distance from the target; share: of the encoder's operations that are left."""
    return trained.options["flops_weight"] * (share - trained.options["flops_target"]) ** 2


SCHEDULE: dict[str, Any] = {
    "prepare": r_of_pair,
    "check": check_r,
    "static": True,
    "r": Option(
        DEFAULT_R,
        "Number of tokens that each layer removes; or one number per layer, as in 16 8 8 0.",
        type=COUNT,
        many=True,
    ),
    "r_inflection": Option(
        None,
        "Slope of the number of removed tokens over the layers, from -1, falling to 0, to 1, rising from 0.",
        type=Number(-1, 1),
        default_text="0, the same in every layer",
    ),
}
LEARNING: dict[str, Any] = {
    "enabled_by": "learned",
    "learned": Option(
        False,
        "Use, or in training learn, values instead of those of the other options.",
        flag={"--learned": True, "--not-learned": False},
    ),
    "flops_target": Option(
        0.7, "Share of the encoder's operations (0 to 1) that a training of the learned parts aims at.", type=SHARE
    ),
    "flops_weight": Option(
        10.0, "Factor in the loss of (share of the encoder's operations - target)².", type=Number(0)
    ),
}
