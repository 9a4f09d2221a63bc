"""ALGM: windows of similar patches merge first (CLAP), then similar tokens wherever they are (GBM)."""

from dataclasses import replace

import g2tm
from patch.method import ModelShape, Number, Option, Options, Step, register
from patch.methods.common import COUNT, GROUPING, THRESHOLD, TOKENS, check_tokens, compared, grouping, tokens_left

TAU = "tau"


@grouping
def _merge(step: Step) -> g2tm.Grouping:
    """Merge by CLAP in the first layer of the list, if there is a window, and by GBM in the others."""
    options, window, metric = step.options, step.options["window"], compared(step)
    rule = {"tokens": tokens_left(step), "batch": step.batch, **step.given}
    if window is None or step.layer != options["layers"][0]:
        by = "threshold" if options["gbm_threshold"] == TAU else "gbm_threshold"
        threshold = options[by] if rule["tokens"] is None else None
        return g2tm.bipartite(metric, threshold=threshold, layer=step.layer, odd_first=step.odd_first, **rule)
    if window[0] > step.grid[0] or window[1] > step.grid[1]:  # no whole window in the image
        return g2tm.Grouping.identity(step.x, **step.given)
    return g2tm.clap(metric, step.grid, options["threshold"], window=window, **rule)


def _layers(shape: ModelShape) -> tuple[int, int]:
    """The layer of CLAP is the first, that of GBM the fifth; of 24 layers the seventh (ALGM, section 4.1)."""
    return (1, 7 if shape.depth >= 24 else 5)


def _check(options: Options, shape: ModelShape) -> None:
    if options["window"] is not None:
        g2tm.check_window(options["window"], shape.grid)
    check_tokens(options, shape)


register(
    "algm",
    _merge,
    summary="Windows of similar patches merge, later similar tokens.",
    check=_check,
    layers=_layers,
    threshold=THRESHOLD,
    tokens=TOKENS,
    window=Option(
        (2, 2),
        "Patches per window, height and width; 0 0: no windows, and GBM in every layer.",
        type=COUNT,
        many=2,
        flag="--merging-window-size",
        key="merging_window_size",
        none=(0, 0),
    ),
    gbm_threshold=Option(
        g2tm.ADAPTIVE,
        "Cosine similarity (-1 to 1) above which GBM merges tokens; adaptive: mean + std / layer of those of the "
        "image; tau: the value of --threshold.",
        type=Number(-1, 1, words=(g2tm.ADAPTIVE, TAU)),
    ),
    **GROUPING | {"metric": replace(GROUPING["metric"], default="tokens")},
    batch=None,
)
