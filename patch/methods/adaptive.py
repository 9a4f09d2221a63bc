"""Methods whose number of tokens is decided by the picture, or by a budget; and the random baseline."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import g2tm
from g2tm import ADAPTIVE, Reduction
from g2tm.components import BACKENDS
from patch.method import Choice, Number, Option, Step, Target, register
from patch.methods.common import THRESHOLD, TOKENS, check_tokens, tokens_left

TAU = "tau"


def _merge_graph(step: Step) -> Reduction:
    """G2TM."""
    given = {"tokens": tokens_left(step), "sizes": step.sizes, "batch": step.batch, "backend": step.options["backend"]}
    return g2tm.graph_merge(step.x, step.grid, step.options["threshold"], **given)


def _check_graph(options: Mapping[str, Any], target: Target) -> None:
    if len(options["layers"]) != 1:
        raise ValueError(f"graph merges once: give one layer, not {list(options['layers'])}")
    check_tokens(options, target)


register(
    "graph",
    _merge_graph,
    check=_check_graph,
    layers=(2,),
    threshold=THRESHOLD,
    tokens=TOKENS,
    backend=Option("auto", "How components are found.", type=Choice(("auto", *BACKENDS))),
)


def _merge_algm(step: Step) -> Reduction:
    """ALGM: CLAP in the first layer of the list, if there is a window, and GBM in the others."""
    options, tokens = step.options, tokens_left(step)
    if options["window"] is not None and step.layer == options["layers"][0]:
        if any(side > own for side, own in zip(options["window"], step.grid, strict=True)):
            return g2tm.Grouping.identity(step.x, step.sizes)  # an image without a whole window
        given = {"window": options["window"], "sizes": step.sizes, "batch": step.batch}
        return g2tm.clap(step.x, step.grid, options["threshold"], tokens=tokens, **given)
    threshold = options["threshold"] if options["gbm_threshold"] == TAU else options["gbm_threshold"]
    rule = {"threshold": threshold, "layer": step.layer} if tokens is None else {"tokens": tokens}
    return g2tm.bipartite(step.tokens, batch=step.batch, **rule, **step.sequence).without_prefix(step.prefix)


def _algm_layers(target: Target) -> tuple[int, int]:
    """CLAP in the first layer, GBM in the fifth; in ViT-L, of 24 layers, in the seventh (ALGM, section 4.1)."""
    return (1, 7 if target.depth >= 24 else 5)


def _check_algm(options: Mapping[str, Any], target: Target) -> None:
    if options["window"] is not None:
        g2tm.check_window(options["window"], target.grid)
    check_tokens(options, target)


register(
    "algm",
    _merge_algm,
    check=_check_algm,
    layers=_algm_layers,
    threshold=THRESHOLD,
    tokens=TOKENS,
    window=Option(
        (2, 2),
        "Patches per window, height and width; 0 0: no windows, GBM in every layer.",
        type=Number(0, integer=True),
        many=2,
        flag="--merging-window-size",
        key="merging_window_size",
        none=(0, 0),
    ),
    gbm_threshold=Option(
        ADAPTIVE, "Threshold of GBM; tau: the same as --threshold.", type=Number(-1, 1, words=(ADAPTIVE, TAU))
    ),
    batch=None,
)


def _merge_mpm(step: Step) -> Reduction:
    """MPM: tokens that are each other's most similar token become one."""
    return g2tm.mutual_pairs(step.x, sizes=step.sizes, batch=step.batch)


register("mpm", _merge_mpm, place="before", layers=(2, 5))


def _merge_randomly(step: Step) -> Reduction:
    """The baseline: as many tokens as a method leaves, but any."""
    seed = step.options["seed"] * (step.depth + 1) + step.layer
    left = tokens_left(step) or step.x.shape[1]
    return g2tm.random_merge(step.x, tokens=min(left, step.x.shape[1]), seed=seed, sizes=step.sizes)


register(
    "random",
    _merge_randomly,
    check=check_tokens,
    layers=(2,),
    tokens=replace(TOKENS, default=0.5),
    seed=Option(
        0, "Which tokens merge by chance.", type=Number(0, integer=True), flag="--merge-seed", key="merge_seed"
    ),
    static=True,
)
