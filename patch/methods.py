"""The built-in methods: one function and one registry entry each."""

from collections.abc import Mapping
from numbers import Real
from typing import Any

from torch import Tensor

import g2tm
from g2tm import ADAPTIVE, Reduction, budget
from g2tm.components import BACKENDS
from patch.learned import add_embeddings
from patch.method import Choice, Number, Option, Step, Target, register

TAU, CODE, PAPER = "tau", "code", "paper"
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
R = Option(
    8,
    "Tokens that a layer removes; or one number per layer, as in 16 8 8 0.",
    type=Number(0, integer=True),
    many=True,
)
INFLECTION = Option(
    None, "From fewer to more removed tokens over the layers (1), or from more to fewer (-1).", type=Number(-1, 1)
)


def _tokens_left(step: Step) -> int | None:
    """The budget of this layer; None: the threshold decides."""
    tokens = step.options["tokens"]
    if isinstance(tokens, list):
        tokens = tokens[step.options["layers"].index(step.layer)]
    return None if tokens is None else budget(tokens, step.grid[0] * step.grid[1])


def _check_tokens(options: Mapping[str, Any], target: Target) -> None:
    tokens, n_layers = options["tokens"], len(options["layers"])
    if isinstance(tokens, list) and len(tokens) != n_layers:
        raise ValueError(f"tokens {tokens}: give one number, or one for each of the {n_layers} merging layers")
    for one in tokens if isinstance(tokens, list) else [tokens]:
        if one is not None:
            budget(one, target.grid[0] * target.grid[1])


def _merge_graph(step: Step) -> Reduction:
    """G2TM."""
    given = {"tokens": _tokens_left(step), "sizes": step.sizes, "batch": step.batch, "backend": step.options["backend"]}
    return g2tm.graph_merge(step.x, step.grid, step.options["threshold"], **given)


def _check_graph(options: Mapping[str, Any], target: Target) -> None:
    if len(options["layers"]) != 1:
        raise ValueError(f"graph merges once: give one layer, not {list(options['layers'])}")
    _check_tokens(options, target)


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
    options, tokens = step.options, _tokens_left(step)
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
    _check_tokens(options, target)


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


def _r_of_pair(given: dict[str, Any]) -> dict[str, Any]:
    """`r=(8, 0.5)` stands for r=8 with r_inflection=0.5."""
    r = given.get("r")
    if not isinstance(r, tuple):
        return given
    if len(r) != 2 or not isinstance(r[1], Real):
        raise ValueError(f"r {r}: give a pair of tokens per layer, 0 or more, and inflection, -1 to 1")
    return given | {"r": r[0], "r_inflection": r[1]}


def _check_r(options: Mapping[str, Any], target: Target) -> None:
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


def _r_here(step: Step) -> int:
    return scheduled_r(step.options["r"], step.options["r_inflection"], step.layer, step.depth)


SCHEDULE = {"prepare": _r_of_pair, "check": _check_r, "r": R, "r_inflection": INFLECTION, "static": True}


def _merge_tome(step: Step) -> Reduction:
    """ToMe: the most similar keys, a fixed number in every layer."""
    return g2tm.bipartite(step.keys, r=_r_here(step), **step.sequence).without_prefix(step.prefix)


register("tome", _merge_tome, needs=["keys"], attention="proportional", **SCHEDULE)


def _merge_tofu(step: Step) -> Reduction:
    """ToFu: drops the matched tokens up to the middle of the network, merges them after it."""
    rule = {"prune": g2tm.prunes(step.layer, step.depth), "variant": step.options["variant"]}
    return g2tm.tofu(step.keys, r=_r_here(step), **rule, **step.sequence).without_prefix(step.prefix)


register(
    "tofu",
    _merge_tofu,
    needs=["keys"],
    variant=Option(
        CODE,
        "Norm of merged tokens. code: divided by the norm of the target; paper: by that of the mean.",
        type=Choice((CODE, PAPER)),
    ),
    **SCHEDULE,
)


def _merge_dct(step: Step) -> Reduction:
    """DCT: the lowest frequencies along the sequence of patch tokens."""
    return g2tm.dct(step.x, r=_r_here(step))


register("dct", _merge_dct, place="block", **SCHEDULE)


def _metric(step: Step) -> Tensor:
    """DTEM's embedding of the input of this block's attention; (B, P + N, d)."""
    layer = step.block.attn.qkv.metric_layer
    return g2tm.embed(step.normed, layer.weight, layer.bias, 0.0 if step.options["variant"] == PAPER else 0.1)


def _merge_dtem(step: Step) -> Reduction:
    """DTEM at inference: ToMe by a learned embedding."""
    return g2tm.bipartite(_metric(step), r=_r_here(step), **step.sequence).without_prefix(step.prefix)


def _soften_dtem(step: Step) -> Reduction:
    """DTEM in training: all tokens stay, and what merged fades out by its size."""
    metric, paper = _metric(step)[:, step.prefix :], step.options["variant"] == PAPER
    sizes = metric.new_ones(metric.shape[:2]) if step.sizes is None else step.sizes
    live, r = step.x.shape[1], 0
    for layer in step.options["layers"]:  # what the layers before have taken out, and what this one does
        live -= r
        r = min(scheduled_r(step.options["r"], step.options["r_inflection"], layer, step.depth), live // 2)
        if layer == step.layer:
            break
    a_index, b_index = g2tm.split(sizes.detach(), live, 0, random=not paper)
    rule = {"r": r, "inverse_temperature": 10.0 if paper else 30.0, "a_index": a_index, "b_index": b_index}
    return g2tm.soft_merge(metric, sizes=sizes, **rule)


register(
    "dtem",
    _merge_dtem,
    needs=["normed"],
    modules=add_embeddings,
    soft=_soften_dtem,
    attention="proportional",
    variant=Option(
        CODE,
        "Training. code: random halves, 1/temperature 30, a tenth of the gradient into features; paper: halves "
        "by position, 10, none.",
        type=Choice((CODE, PAPER)),
    ),
    **SCHEDULE,
)


def _merge_mpm(step: Step) -> Reduction:
    """MPM: tokens that are each other's most similar token become one."""
    return g2tm.mutual_pairs(step.x, sizes=step.sizes, batch=step.batch)


register("mpm", _merge_mpm, place="before", layers=(2, 5))
