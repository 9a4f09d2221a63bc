"""The built-in methods: one function and one registry entry each."""

from numbers import Real

from g2tm import ADAPTIVE, bipartite, check_threshold, check_window, clap, graph_merge
from g2tm.components import check_backend
from patch.registry import register

TAU = "tau"


def _merge_graph(step):
    """G2TM."""
    options = step.settings
    return graph_merge(
        step.x, step.grid, options["threshold"], sizes=step.sizes, batch=step.batch, backend=options["backend"]
    )


def _check_graph(settings, encoder):
    check_threshold(settings["threshold"])
    check_backend(settings["backend"])
    if len(settings["layers"]) != 1:
        raise ValueError(f"graph merges once: give one layer, not {list(settings['layers'])}")


register("graph", _merge_graph, check=_check_graph, layers=(2,), threshold=0.88, backend="auto")


def _merge_algm(step):
    """ALGM: CLAP in the first layer of the list, if there is a window, and GBM in the others."""
    options = step.settings
    if options["window"] is not None and step.layer == options["layers"][0]:
        window = tuple(options["window"])
        return clap(step.x, step.grid, options["threshold"], window=window, sizes=step.sizes, batch=step.batch)
    threshold = options["threshold"] if options["gbm_threshold"] == TAU else options["gbm_threshold"]
    matched = bipartite(
        step.tokens,
        threshold=threshold,
        layer=step.layer,
        sizes=step.sequence_sizes,
        prefix=step.prefix,
        batch=step.batch,
    )
    return matched.without_prefix(step.prefix)


def _algm_layers(encoder):
    """CLAP in the first layer, GBM in the fifth; in ViT-L, of 24 layers, in the seventh (ALGM, section 4.1)."""
    return (1, 7 if encoder.depth >= 24 else 5)


def _check_algm(settings, encoder):
    check_threshold(settings["threshold"])
    if settings["window"] is not None:
        check_window(settings["window"], encoder.grid)
    if settings["gbm_threshold"] not in (ADAPTIVE, TAU):
        if isinstance(settings["gbm_threshold"], str):
            raise ValueError(
                f"gbm_threshold {settings['gbm_threshold']!r}: give adaptive, tau or a number from -1 to 1"
            )
        check_threshold(settings["gbm_threshold"], "gbm_threshold")


register(
    "algm",
    _merge_algm,
    check=_check_algm,
    nullable=("window",),
    layers=_algm_layers,
    threshold=0.88,
    window=(2, 2),
    gbm_threshold=ADAPTIVE,
    batch=None,
)


def _merge_tome(step):
    """ToMe: the most similar keys, a fixed number in every layer."""
    removed = scheduled_r(step.settings["r"], step.layer, step.depth)
    sizes = step.sequence_sizes
    matched = bipartite(step.keys, r=removed, sizes=sizes, prefix=step.prefix, batch=step.batch, padded=step.padded)
    return matched.without_prefix(step.prefix)


def scheduled_r(r, layer, depth):
    """Tokens that a layer removes (ToMe, section 3 and appendix).

    Args:
        r: the same in every layer; or a list with one number per layer; or a pair (r, inflection) as a tuple, with
            which layer l (from 0) removes int(lo + (hi - lo)·l/(depth - 1)), lo = int(r·(1 - inflection)),
            hi = 2r - lo.
        layer: 1-based.
        depth: number of layers.
    """
    if isinstance(r, int):
        return r
    if isinstance(r, list):
        return r[layer - 1]
    total, inflection = r
    low = int(total * (1 - inflection))
    high = 2 * total - low
    return int(low + (high - low) * (layer - 1) / max(depth - 1, 1))


def _check_tome(settings, encoder):
    r, depth = settings["r"], encoder.depth
    if isinstance(r, list):
        if len(r) != depth or not all(_is_count(n) for n in r):
            raise ValueError(f"r {r}: give one number from 0 for each of the {depth} layers")
    elif isinstance(r, tuple):
        if len(r) != 2 or not _is_count(r[0]) or not isinstance(r[1], Real) or not -1 <= r[1] <= 1:
            raise ValueError(f"r {r}: give a pair of tokens per layer, 0 or more, and inflection, -1 to 1")
    elif not _is_count(r):
        raise ValueError(f"r {r!r}: give the number of tokens that a layer removes, 0 or more")


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


register("tome", _merge_tome, check=_check_tome, needs_keys=True, r=8, attention="proportional")
