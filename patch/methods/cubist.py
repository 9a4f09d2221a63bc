"""CubistMerge: rows, then columns, lose as many tokens each, and a rectangle is left."""

from dataclasses import replace

import g2tm
from g2tm.cubist import VALUES, Grid, removed
from patch.method import Choice, ModelShape, Number, Option, Options, Step, register
from patch.methods.common import RESTORE_AT, TOKENS, check_restore_at, check_tokens


def _merge(step: Step) -> g2tm.Reduction:
    grid, layers = step.grid, step.options["layers"]
    for turn in range(layers.index(step.layer)):
        grid = _left(step.options, turn, grid, step.grid)
    left = _left(step.options, layers.index(step.layer), grid, step.grid)
    remove = grid[0] - left[0], grid[1] - left[1]
    return g2tm.cubist(step.x, grid, remove=remove, value=step.options["group_value"], sizes=step.sizes)


def _left(options: Options, turn: int, grid: Grid, patches: Grid) -> Grid:
    """The rectangle that the merge of this turn leaves of a grid."""
    tokens = options["tokens"]
    if tokens is None:
        r_h, r_w = (min(r, side // 2) for r, side in zip(removed(options["remove"], grid), grid, strict=True))
        return grid[0] - r_h, grid[1] - r_w
    wanted = g2tm.budget(tokens[turn] if isinstance(tokens, list) else tokens, patches[0] * patches[1])
    return g2tm.rectangle(min(wanted, grid[0] * grid[1]), grid)


def _check(options: Options, shape: ModelShape) -> None:
    removed(options["remove"], shape.grid)
    check_tokens(options, shape)
    check_restore_at(options, shape, first=options["layers"][-1])
    grid = shape.grid
    for turn in range(len(options["layers"])):
        grid = _left(options, turn, grid, shape.grid)


register(
    "cubist",
    _merge,
    summary="Rows and columns lose tokens; a rectangle is left.",
    check=_check,
    place="before",
    static=True,
    layers=(2,),
    tokens=replace(
        TOKENS,
        help="Patch tokens that are left after each merging layer, a number or a share (0 to 1), or one for each of "
        "these layers: at most so many, as they fill a rectangle.",
        default_text="none, remove decides",
    ),
    remove=Option(
        (0.1, 0.1),
        "Rows and columns that each merging layer removes, or shares of them (0 to 1); at most half.",
        type=Number(0, integer=None),
        many=2,
    ),
    group_value=Option(
        "entry",
        "Value of a group. entry: of every channel the entry of largest magnitude; mean: by sizes; token: the token of "
        "largest norm.",
        type=Choice(VALUES),
    ),
    restore_at=RESTORE_AT,
)
