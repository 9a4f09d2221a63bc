"""Keymatch, ours: ToMe's matching in a few early layers, down to a budget in each. Why so: results/keymatch.md."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from numbers import Integral

import g2tm
from patch.method import ModelShape, Option, Options, Step, register
from patch.methods.common import GROUPING, TOKENS, check_tokens, compared, grouping

LAYERS, DEPTH = (2, 3, 4, 6), 12  # the layers of an encoder so deep


@grouping
def _merge(step: Step) -> g2tm.Grouping:
    metric = compared(step)
    if step.options["center"]:
        metric = metric - metric.mean(1, keepdim=True)
    layers = step.options["layers"]
    tokens = _budgets(step.options["tokens"], len(layers), step.grid)[layers.index(step.layer)]
    return g2tm.bipartite(metric, tokens=tokens, odd_first=step.odd_first, keep_order=True, **step.given)


def _layers(shape: ModelShape) -> list[int]:
    """The default layers, scaled with the depth; the first one is too early to merge in."""
    scaled = {max(round(layer * shape.depth / DEPTH), 2) for layer in LAYERS}
    return sorted(min(layer, shape.depth) for layer in scaled)


def _budgets(tokens: float | Sequence[float], n_layers: int, grid: tuple[int, int]) -> list[int]:
    """Patch tokens after each merging layer: as they are given, or falling geometrically to the one that is given."""
    n_patches = grid[0] * grid[1]
    if isinstance(tokens, Sequence):
        given, wanted = [*tokens], [g2tm.budget(one, n_patches) for one in tokens]
    else:
        last = g2tm.budget(tokens, n_patches)
        given = [1.0] * (n_layers - 1) + [tokens]
        wanted = [round(n_patches * (last / n_patches) ** (index / n_layers)) for index in range(1, n_layers + 1)]
    before = n_patches
    found: list[int] = []  # torch.compile cannot trace list[int]()
    for one, left in zip(given, wanted, strict=True):
        # Of an odd number of tokens a layer removes the smaller half; a count that was typed is not changed.
        before = (before + 1) // 2 if left == before // 2 and not isinstance(one, Integral) else left
        found.append(before)
    return found


def _check(options: Options, shape: ModelShape) -> None:
    check_tokens(options, shape)
    tokens = options["tokens"]
    budgets = [shape.grid[0] * shape.grid[1], *_budgets(tokens, len(options["layers"]), shape.grid)]
    for before, left in pairwise(budgets):
        if not (before + 1) // 2 <= left <= before:
            raise ValueError(
                f"tokens {tokens}: a layer of keymatch can leave {(before + 1) // 2} to {before} of {before} tokens, "
                f"not {left}; give numbers that fall more slowly, or more layers"
            )


register(
    "keymatch",
    _merge,
    summary="The most similar keys merge in a few early layers.",
    check=_check,
    static=True,
    layers=_layers,
    tokens=replace(
        TOKENS,
        default=0.5,
        help="Patch tokens that are left after the last merging layer, a number or a share (0 to 1), to which they "
        "fall geometrically; or one for each of these layers.",
        default_text="",
    ),
    center=Option(
        True,
        "Subtract the mean over the image from these vectors before they are compared.",
        flag={"--center": True, "--no-center": False},
    ),
    **GROUPING,
)
