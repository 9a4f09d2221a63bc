"""The methods that can be patched in: one entry each, in one registry."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from g2tm import BATCH_MODES, Reduction, check_threshold, graph_merge
from g2tm.attention import check_attention


@dataclass(frozen=True)
class Step:
    """What a method gets to see at one layer.

    Attributes:
        x: (B, N, D), the patch tokens after attention, prefix tokens left out.
        grid: (gh, gw), patches of the padded image.
        sizes: (B, N), patches per token, 0 for padding; None before the first merge.
        layer: 1-based.
        settings: the options of the patch.
    """

    x: Any
    grid: tuple[int, int]
    sizes: Any
    layer: int
    settings: Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """A merging method.

    Attributes:
        merge: from a `Step` to a `Reduction` of its patch tokens.
        defaults: the options of the method and their values; among them always `layers` (1-based, ascending),
            `attention` and `batch`.
        check: raises a ValueError if the options of the method itself are not allowed.
    """

    merge: Callable[[Step], Reduction]
    defaults: Mapping[str, Any]
    check: Callable[[Mapping[str, Any]], None] = field(default=lambda settings: None)


COMMON = {"layers": None, "attention": "none", "batch": "ragged"}
METHODS: dict[str, Method] = {}


def register(name, merge, *, check=None, **defaults):
    """Make a method available by name to `patch.segmenter` and to `--patch-type` of every command.

    Args:
        name: its name.
        merge: from a `Step` to a `Reduction`.
        check: raises a ValueError for options that are not allowed.
        defaults: the options that it takes with their defaults, besides `layers`, `attention` and `batch`.

    Raises:
        ValueError: the name is taken.
    """
    if name in METHODS or name == "pure":
        raise ValueError(f"method {name!r} is registered already")
    METHODS[name] = Method(merge, COMMON | defaults, check or (lambda settings: None))


def resolve(name, depth, options):
    """Complete and check the options of a method.

    Args:
        name: a registered method.
        depth: number of blocks of the encoder.
        options: what the user gave; None means the method's default.

    Returns:
        (method, settings).

    Raises:
        ValueError: unknown method or option, or a value that is not allowed.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    method = METHODS[name]
    unknown = sorted(set(options) - set(method.defaults))
    if unknown:
        raise ValueError(f"{name} takes no {', '.join(unknown)}: its options are {', '.join(method.defaults)}")
    settings = dict(method.defaults) | {key: value for key, value in options.items() if value is not None}
    check_attention(settings["attention"])
    if settings["batch"] not in BATCH_MODES:
        raise ValueError(f"batch {settings['batch']!r}: choose {' or '.join(BATCH_MODES)}")
    settings["layers"] = _check_layers(settings["layers"], depth)
    method.check(settings)
    return method, settings


def _check_layers(layers, depth):
    layers = tuple(range(1, depth + 1)) if layers is None else tuple(layers)
    if not layers or not all(isinstance(layer, int) and 1 <= layer <= depth for layer in layers):
        raise ValueError(f"layers {list(layers)}: the encoder has layers 1 to {depth}")
    if any(first >= second for first, second in pairwise(layers)):
        raise ValueError(f"layers {list(layers)}: give each layer once, in ascending order")
    return layers


def _merge_graph(step):
    settings = step.settings
    return graph_merge(
        step.x,
        step.grid,
        settings["threshold"],
        sizes=step.sizes,
        batch=settings["batch"],
        backend=settings["backend"],
    )


def _check_graph(settings):
    check_threshold(settings["threshold"])
    if len(settings["layers"]) != 1:
        raise ValueError(f"graph merges once: give one layer, not {list(settings['layers'])}")


register("graph", _merge_graph, check=_check_graph, layers=(2,), threshold=0.88, backend="auto")
