"""Methods with learned parts: an embedding, rates, thresholds, an adapter."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import g2tm
from g2tm import Reduction
from patch.learned import MERGE_THRESHOLD, add_adapters, add_clusters, add_embeddings, add_rates, add_thresholds
from patch.method import Choice, Masking, Number, Option, Step, Target, Trained, register
from patch.methods.common import (
    DEFAULT_R,
    PAPER,
    SCHEDULE,
    TOKENS,
    VARIANT,
    R,
    check_r,
    check_tokens,
    r_here,
    scheduled_r,
    tokens_left,
)

LEARNED = Option(
    False,
    "Go by what was learned, or train it, instead of what the other options say.",
    flag={"--learned": True, "--not-learned": False},
)
TARGET = Option(
    0.7,
    "Share of the encoder's operations that a training of the learned parts aims at.",
    type=Number(0, 1),
    flag="--flops-target",
)


def _weight(default: float) -> Option:
    return Option(
        default,
        "Weight in the loss of (share of the encoder's operations - target)².",
        type=Number(0),
        flag="--flops-weight",
    )


def _metric(step: Step) -> Tensor:
    """DTEM's embedding of the input of this block's attention; (B, P + N, d)."""
    layer = step.block.attn.qkv.metric_layer
    return g2tm.embed(step.normed, layer.weight, layer.bias, 0.0 if step.options["variant"] == PAPER else 0.1)


def _merge_dtem(step: Step) -> Reduction:
    """DTEM at inference: ToMe by a learned embedding."""
    return g2tm.bipartite(_metric(step), r=r_here(step), **step.sequence).without_prefix(step.prefix)


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
    variant=replace(
        VARIANT,
        help="Training. code: random halves, 1/temperature 30, a tenth of the gradient into features; paper: halves "
        "by position, 10, none.",
    ),
    **SCHEDULE,
)


def _check_learned(options: Mapping[str, Any], *others: str) -> None:
    """What is given by hand and what is learned do not go together."""
    given = [name for name in others if options[name] is not None]
    if options["learned"] and given:
        raise ValueError(f"{', '.join(given)}: learned values are used in its place; give --not-learned as well")


def _merge_diffrate(step: Step) -> Reduction:
    """DiffRate: the least attended tokens leave, the next ones merge; how many is given or learned."""
    options, length = step.options, step.tokens.shape[1]
    if options["learned"]:
        kept, merged = int(step.block.prune_ddp(step.prefix)), int(step.block.merge_ddp(step.prefix))
    elif options["prune_kept"] is None and options["merge_kept"] is None:
        r = scheduled_r(options["r"] or DEFAULT_R, options["r_inflection"], step.layer, step.depth)
        kept, merged = length, max(length - min(r, length // 2), step.prefix + 1)
    else:
        index = options["layers"].index(step.layer)
        counts = [length if options[name] is None else options[name][index] for name in ("prune_kept", "merge_kept")]
        kept, merged = counts
    given = {"importance": step.row, "kept": kept, "merged": merged}
    return g2tm.diffrate(step.tokens, **given, **step.whole).without_prefix(step.prefix)


def _soften_diffrate(step: Step) -> Reduction:
    """DiffRate in training: a mask in place of removal, which tells the rates what they cost."""
    rates = {
        name: (rate.selected_probability, rate.kept_token_candidate)
        for name, rate in (("prune", step.block.prune_ddp), ("merge", step.block.merge_ddp))
    }
    given = {"importance": step.row, "mask": step.whole_mask}
    return g2tm.diffrate_training(step.tokens, **given, **rates, **step.whole).without_prefix(step.prefix)


def _diffrate_loss(trained: Trained) -> Tensor:
    """Squared distance from the target, in shares of the operations without any reduction."""
    options, patches = trained.options, trained.grid[0] * trained.grid[1]
    everyone = [patches + trained.prefix] * len(trained.blocks)
    prune, merge = list[Any](everyone), list[Any](everyone)
    for layer in trained.steps:
        block: Any = trained.blocks[layer - 1]
        prune[layer - 1], merge[layer - 1] = block.prune_ddp(trained.prefix), block.merge_ddp(trained.prefix)
    model = {"patches": patches, "width": trained.width, "prefix": trained.prefix}
    share = g2tm.gigaflops(prune, merge, **model) / g2tm.gigaflops(everyone, everyone, **model)
    return options["flops_weight"] * (share - options["flops_target"]) ** 2


def _check_diffrate(options: Mapping[str, Any], target: Target) -> None:
    check_r(options, target)
    _check_learned(options, "r", "prune_kept", "merge_kept")
    for name in ("prune_kept", "merge_kept"):
        counts = options[name]
        if counts is not None and (not isinstance(counts, list) or len(counts) != len(options["layers"])):
            raise ValueError(f"{name} {counts}: give one number for each of the {len(options['layers'])} layers")


def _kept(what: str) -> Option:
    return Option(
        None,
        f"Tokens, CLS included, that each layer keeps after {what}; instead of --r.",
        type=Number(2, integer=True),
        many=True,
    )


register(
    "diffrate",
    _merge_diffrate,
    needs=["row"],
    modules=add_rates,
    switch="learned",
    soft=_soften_diffrate,
    masks=Masking(epsilon=1e-6, keeps_self=True),
    loss=_diffrate_loss,
    attention="proportional",
    learned=LEARNED,
    prune_kept=_kept("pruning"),
    merge_kept=_kept("merging"),
    granularity=Option(
        4, "Patch tokens from one candidate of a learned rate to the next.", type=Number(1, integer=True)
    ),
    flops_target=TARGET,
    flops_weight=_weight(100.0),
    **SCHEDULE | {"check": _check_diffrate, "r": replace(R, default=None, help=f"{R.help}  [default: {DEFAULT_R}]")},
)


def _merge_ltmp(step: Step) -> Reduction:
    """LTMP: merges what is similar enough, then prunes what is not important enough."""
    merge, prune = (threshold.detach() for threshold in _thresholds(step))
    rule = {"merge_threshold": merge, "prune_threshold": prune, "tokens": tokens_left(step)}
    given = {"importance": step.means, "batch": step.batch, **step.sequence}
    merged: Any = g2tm.ltmp(step.tokens, step.keys, **rule, **given)
    return merged.without_prefix(step.prefix)


def _thresholds(step: Step) -> tuple[Tensor, Tensor]:
    """Those of similarity and importance.

    Importance is a share of all attention: with more patches than the model was made for, each has less of it.
    """
    block: Any = step.block
    if step.options["learned"]:
        merge, prune = (masker.threshold.clamp(0, 1) for masker in (block.merge_masker, block.prune_masker))
    else:
        given = (step.options["merge_threshold"], step.options["prune_threshold"])
        pairs = zip(given, (MERGE_THRESHOLD, 0.0), strict=True)
        merge, prune = (torch.tensor([default if value is None else value]) for value, default in pairs)
    tokens, made_for = (step.prefix + grid[0] * grid[1] for grid in (step.grid, step.made_for))
    device = step.tokens.device
    return merge.to(device), prune.to(device) * (made_for / tokens)


def _soften_ltmp(step: Step) -> Reduction:
    """LTMP in training: masks in place of removal, which tell the thresholds what they cost."""
    merge, prune = _thresholds(step)
    given = {"importance": step.means, "mask": step.whole_mask, "merge_threshold": merge, "prune_threshold": prune}
    return g2tm.ltmp_training(step.tokens, step.keys, **given, **step.whole).without_prefix(step.prefix)


def _ltmp_loss(trained: Trained) -> Tensor:
    """Squared distance of the share of operations that are left from the target."""
    first = next(iter(trained.steps.values())).mask
    masks = [torch.ones_like(first)]
    for layer in range(1, len(trained.blocks) + 1):
        masks.append(trained.steps[layer].mask if layer in trained.steps else masks[-1])
    share = g2tm.operations_left(masks[1:], trained.width, trained.prefix)
    return trained.options["flops_weight"] * (share - trained.options["flops_target"]) ** 2


def _check_ltmp(options: Mapping[str, Any], target: Target) -> None:
    check_tokens(options, target)
    _check_learned(options, "merge_threshold", "prune_threshold")


register(
    "ltmp",
    _merge_ltmp,
    check=_check_ltmp,
    needs=["keys", "means"],
    modules=add_thresholds,
    switch="learned",
    soft=_soften_ltmp,
    masks=Masking(epsilon=1e-5, keeps_self=False),
    loss=_ltmp_loss,
    attention="proportional",
    learned=LEARNED,
    merge_threshold=Option(
        None,
        f"Cosine similarity above which tokens merge; 1: none does.  [default: {MERGE_THRESHOLD}]",
        type=Number(0, 1),
    ),
    prune_threshold=Option(
        None,
        "Share of all attention up to which a token is pruned, at the image size that the model was made for.  "
        "[default: 0, none is]",
        type=Number(0, 1),
    ),
    tokens=TOKENS,
    flops_target=TARGET,
    flops_weight=_weight(10.0),
)


def _fpet_metric(step: Step) -> Tensor:
    """Keys, (B, P + N, d); refined by the adapter, where there is one."""
    if not step.options["adapter"]:
        return step.keys
    return step.keys.detach() + step.block.metric_adapter(step.keys)


def _merge_fpet(step: Step) -> Reduction:
    """FPET: half of a checkerboard merges into the other half."""
    return g2tm.fpet(_fpet_metric(step), step.grid, **step.whole).without_prefix(step.prefix)


def _soften_fpet(step: Step) -> Reduction:
    """FPET in training: the same tokens, with a gradient for the metric."""
    return g2tm.fpet_training(_fpet_metric(step), step.grid, **step.whole).without_prefix(step.prefix)


def _check_fpet(options: Mapping[str, Any], target: Target) -> None:
    if len(options["layers"]) != 1:
        raise ValueError(f"fpet merges once, it needs the whole grid: give one layer, not {list(options['layers'])}")


register(
    "fpet",
    _merge_fpet,
    check=_check_fpet,
    needs=["keys"],
    modules=add_adapters,
    switch="adapter",
    soft=_soften_fpet,
    layers=lambda target: (target.depth // 2 + 1,),
    adapter=Option(
        False,
        "Refine the keys by a trained bottleneck before tokens are compared.",
        flag={"--adapter": True, "--no-adapter": False},
    ),
    static=True,
)


def _merge_clusters(step: Step) -> Reduction:
    """ClustViT: tokens of one learned cluster become one; an image that has one cluster alone keeps all."""
    logits = step.encoder.clusterer(step.x)
    ids = logits.argmax(-1)
    skipped = None
    if step.options["cluster_rule"] == BATCH:
        skipped = (ids == ids[:1, :1]).all().expand(len(ids))
    return g2tm.Clusters(step.x, ids, step.options["clusters"], step.encoder.expand_mlp, skipped, logits)


def _clustering_loss(trained: Trained) -> Tensor:
    """Cross-entropy of the clusters against the labels that cover most patches."""
    if trained.labels is None:
        raise ValueError("clustvit learns its clusters from the label maps: give them to patch.loss")
    (step,), options = trained.steps.values(), trained.options
    ids = g2tm.cluster_labels(trained.labels, trained.patch_size, options["clusters"])
    return options["cluster_weight"] * g2tm.clustering_loss(step.logits, ids)


def _place_clusters(options: dict[str, Any]) -> dict[str, Any]:
    """The published name of the layer: injection point, behind so many blocks."""
    point = options.pop("injection_point", None)
    return options if point is None else options | {"layers": [point]}


def _check_clusters(options: Mapping[str, Any], target: Target) -> None:
    layers = options["layers"]
    if len(layers) != 1 or layers[0] >= target.depth:
        raise ValueError(f"layers {list(layers)}: clustvit has one injection point, from 0 to {target.depth - 1}")
    if options["attention"] != "none":
        raise ValueError(f"attention {options['attention']}: clustvit counts every token as one, give none")


BATCH = "batch"
register(
    "clustvit",
    _merge_clusters,
    prepare=_place_clusters,
    check=_check_clusters,
    place="block",
    undo="encoder",
    modules=add_clusters,
    soft=_merge_clusters,
    loss=_clustering_loss,
    layers=(3,),
    injection_point=Option(
        None, "Blocks before the merge: the same as the layer.", type=Number(0, integer=True), flag="--injection-point"
    ),
    clusters=Option(3, "Number of clusters.", type=Number(1, integer=True), flag="--clusters"),
    cluster_width=Option(
        None, "Width of the cluster module; by default 129/32 of the model's.", type=Number(1, integer=True),
        flag="--cluster-width",
    ),
    cluster_rule=Option(
        "image", "What is left alone: an image whose tokens all have one id, or a batch of them.",
        type=Choice(("image", BATCH)), flag="--cluster-rule",
    ),
    cluster_weight=Option(0.1, "Weight of the clustering loss.", type=Number(0), flag="--cluster-weight"),
)  # fmt: skip
