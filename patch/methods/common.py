"""What the entries of several methods share: options, budgets, and numbers of removed tokens per layer."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from g2tm import budget
from g2tm.validation import check_r as check_count
from patch.method import Choice, Number, Option, Step, Target

CODE, PAPER = "code", "paper"
THRESHOLD = Option(
    0.88,
    "Cosine similarity (-1 to 1) above which tokens may merge; auto: only in training, with --from.",
    type=Number(-1, 1, read=("auto",)),
)
TOKENS = Option(
    None,
    "Instead of a threshold: patch tokens that are left after each merging layer, a number or a share (0 to 1); or one "
    "for each of these layers.",
    type=Number(0, integer=None),
    many=True,
)
DEFAULT_R = 8
R = Option(
    DEFAULT_R,
    "Tokens that a layer removes; or one number per layer, as in 16 8 8 0.",
    type=Number(0, integer=True),
    many=True,
)
INFLECTION = Option(
    None, "From fewer to more removed tokens over the layers (1), or from more to fewer (-1).", type=Number(-1, 1)
)


def tokens_left(step: Step) -> int | None:
    """The budget of this layer; None: the threshold decides."""
    tokens = step.options["tokens"]
    if isinstance(tokens, list):
        tokens = tokens[step.options["layers"].index(step.layer)]
    return None if tokens is None else budget(tokens, step.grid[0] * step.grid[1])


def check_tokens(options: Mapping[str, Any], target: Target) -> None:
    tokens, n_layers = options["tokens"], len(options["layers"])
    if isinstance(tokens, list) and len(tokens) != n_layers:
        raise ValueError(f"tokens {tokens}: give one number, or one for each of the {n_layers} merging layers")
    for one in tokens if isinstance(tokens, list) else [tokens]:
        if one is not None:
            budget(one, target.grid[0] * target.grid[1])


def r_of_pair(given: dict[str, Any]) -> dict[str, Any]:
    """`r=(8, 0.5)` stands for r=8 with r_inflection=0.5."""
    r = given.get("r")
    if not isinstance(r, tuple):
        return given
    if len(r) != 2 or not isinstance(r[1], Real):
        raise ValueError(f"r {r}: give a pair of tokens per layer, 0 or more, and inflection, -1 to 1")
    return given | {"r": r[0], "r_inflection": r[1]}


def check_r(options: Mapping[str, Any], target: Target) -> None:
    r = options["r"]
    if isinstance(r, list) and options["r_inflection"] is not None:
        raise ValueError(f"r {r}: an inflection goes with one number for all layers")
    if isinstance(r, list) and len(r) != target.depth:
        raise ValueError(f"r {r}: give one number from 0 for each of the {target.depth} layers")


def scheduled_r(r: int | list[int], inflection: float | None, layer: int, depth: int) -> int:
    """Tokens that a layer removes (ToMe, section 3 and appendix).

    Args:
        r: the same in every layer, or a list with one number per layer.
        inflection: f: layer l (from 0) removes int(lo + (hi - lo)·l/(depth - 1)), lo = int(r·(1 - f)), hi = 2r - lo.
        layer: 1-based.
        depth: number of layers.
    """
    if isinstance(r, list):
        return r[layer - 1]
    if inflection is None:
        return r
    low = int(r * (1 - inflection))
    high = 2 * r - low
    return int(low + (high - low) * (layer - 1) / max(depth - 1, 1))


def total_schedule(total: int, inflection: float, depth: int) -> list[int]:
    """Tokens that every layer removes so that all layers together remove a number (OpenToMe's schedules).

    Each layer removes total / depth, inflected as in `scheduled_r`; what the whole numbers lack goes to the first layer
    where the inflection is below 0, else to the last.

    Args:
        total: of all layers.
        inflection: from -1 to 1.
        depth: number of layers.

    Raises:
        ValueError: a total or an inflection that is not allowed.
    """
    check_count(total)
    if not -1 <= inflection <= 1:
        raise ValueError(f"inflection {inflection}: give a number from -1 to 1")
    schedule = [max(scheduled_r(total // depth, inflection, layer, depth), 0) for layer in range(1, depth + 1)]
    schedule[0 if inflection < 0 else -1] += total - sum(schedule)
    return schedule


def r_here(step: Step) -> int:
    return scheduled_r(step.options["r"], step.options["r_inflection"], step.layer, step.depth)


VARIANT = Option(CODE, "As the published code does it, or as the paper says.", type=Choice((CODE, PAPER)))
SCHEDULE = {"prepare": r_of_pair, "check": check_r, "r": R, "r_inflection": INFLECTION, "static": True}
