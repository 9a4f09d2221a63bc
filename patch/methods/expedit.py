"""Expedit: once, in the middle, tokens become a small grid of soft clusters, and are mixed back from them."""

from dataclasses import replace

import g2tm
from g2tm.expedit import check_clustering, check_clusters
from patch.method import Choice, ModelShape, Number, Option, Options, Step, register
from patch.methods.common import COUNT, POSITIVE, RESTORE_AT, TOKENS, check_restore_at, check_tokens, tokens_left


def _merge(step: Step) -> g2tm.Reduction:
    options, tokens = step.options, tokens_left(step)
    assert tokens is not None
    return g2tm.expedit(
        step.x,
        step.grid,
        clusters=options["cluster_grid"] or g2tm.cluster_grid(tokens, step.grid),
        window=options["cluster_window"],
        k=options["neighbors"],
        **{name: options[name] for name in ("iterations", "temperature", "restore_temperature", "weighting")},
    )


def _layers(shape: ModelShape) -> tuple[int]:
    """Return 10 of 24, as released for ADE20K."""
    return (max(1, 10 * shape.depth // 24),)


def _check(options: Options, shape: ModelShape) -> None:
    layers, neighbors = options["layers"], options["neighbors"]
    if len(layers) != 1:
        raise ValueError(f"expedit clusters once: give one layer, not {list(layers)}")
    if options["cluster_grid"] is not None:
        check_clusters(options["cluster_grid"], shape.grid)
    if neighbors == 0:
        raise ValueError("neighbors 0: give a number of tokens from 1, or -1 for all")
    check_clustering(options["iterations"], options["cluster_window"])
    check_tokens(options, shape)
    check_restore_at(options, shape, first=max(layers[0], 1))


register(
    "expedit",
    _merge,
    summary="Tokens become a grid of clusters, and are mixed back.",
    check=_check,
    place="block",
    static=True,
    layers=_layers,
    tokens=replace(
        TOKENS,
        default=0.5,
        help="Patch tokens that are left, a number or a share (0 to 1): about so many, as they fill a grid.",
        default_text="",
    ),
    cluster_grid=Option(
        None,
        "Rows and columns of clusters, instead of tokens.",
        type=POSITIVE,
        many=2,
        default_text="as tokens says, of about the shape of the image",
    ),
    iterations=Option(5, "Rounds of k-means; 0: tokens are pooled.", type=COUNT),
    cluster_window=Option(5, "Rows and columns of clusters that a token may join, an odd number.", type=POSITIVE),
    temperature=Option(0.02, "Factor of squared distances in the clustering; larger is sharper.", type=Number(0)),
    neighbors=Option(
        20, "Number of nearest tokens that a patch is mixed from; -1: all.", type=Number(-1, integer=True)
    ),
    restore_temperature=Option(
        None,
        "Factor of squared distances in the mix; larger is sharper.",
        type=Number(0),
        default_text="that of the clustering",
    ),
    weighting=Option(
        "euclidean",
        "Norm by which the weights of the mix are divided. euclidean: as published, but relative to the nearest token; "
        "published: patches far from all tokens fade; sum: they sum to one.",
        type=Choice(g2tm.WEIGHTINGS),
    ),
    restore_at=replace(RESTORE_AT, default="before_norm"),
)
