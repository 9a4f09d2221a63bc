"""The methods that can be patched in: one entry each, in one registry."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from g2tm import BATCH_MODES, Reduction
from g2tm.attention import check_attention


@dataclass(frozen=True)
class Step:
    """What a method gets to see at one layer, between attention and MLP.

    Attributes:
        tokens: (B, P + N, D), the residual stream after attention, prefix tokens first.
        keys: (B, P + N, head dim), keys of this attention averaged over the heads; None unless the method asked.
        prefix: P, number of prefix tokens.
        grid: (gh, gw), patches of the padded image.
        sizes: (B, N), patches per patch token, 0 for padding; None before the first merge.
        padded: whether any of the sizes is 0.
        layer, depth: this layer, 1-based, and how many there are.
        batch: "ragged" or "uniform".
        settings: the options of the patch.
    """

    tokens: Tensor
    keys: Tensor | None
    prefix: int
    grid: tuple[int, int]
    sizes: Tensor | None
    padded: bool
    layer: int
    depth: int
    batch: str
    settings: Mapping[str, Any]

    @property
    def x(self):
        """(B, N, D), the patch tokens alone."""
        return self.tokens[:, self.prefix :]

    @property
    def sequence_sizes(self):
        """(B, P + N), sizes of the whole sequence, prefix tokens counting 1; None before the first merge."""
        return None if self.sizes is None else F.pad(self.sizes, (self.prefix, 0), value=1.0)


@dataclass(frozen=True)
class Method:
    """A merging method.

    Attributes:
        merge: from a `Step` to a `Reduction` of its patch tokens.
        defaults: the options of the method and their values; among them always `layers`, `attention` and `batch`.
        check: raises a ValueError if the options of the method itself are not allowed.
        needs_keys: whether `Step.keys` is wanted.
        nullable: options for which None is a value of its own; elsewhere it means the default.
    """

    merge: Callable[[Step], Reduction]
    defaults: Mapping[str, Any]
    check: Callable[[Mapping[str, Any]], None]
    needs_keys: bool = False
    nullable: tuple[str, ...] = ()


@dataclass(frozen=True)
class Encoder:
    """What the options are checked against: number of blocks, and the grid that the model was made for."""

    depth: int
    grid: tuple[int, int]


# layers None: every layer. batch None: uniform in training, so that no padding arises, ragged otherwise.
COMMON = {"layers": None, "attention": "none", "batch": "ragged"}
METHODS: dict[str, Method] = {}


def register(name, merge, *, check=None, needs_keys=False, nullable=(), **defaults):
    """Make a method available by name to `patch.segmenter` and to `--patch-type` of every command.

    Args:
        name: its name.
        merge: from a `Step` to a `Reduction` of its patch tokens.
        check: called with the completed options and, as `encoder`, what they are checked against; raises a
            ValueError for options that are not allowed.
        needs_keys: whether `Step.keys` is wanted.
        nullable: options for which None is a value of its own.
        defaults: the options that it takes with their defaults, besides `layers` (1-based, ascending; None: all),
            `attention` and `batch`. A default may be a function of the `Encoder`.

    Raises:
        ValueError: the name is taken.
    """
    if name in METHODS or name == "pure":
        raise ValueError(f"method {name!r} is registered already")
    METHODS[name] = Method(merge, COMMON | defaults, check or (lambda settings, encoder: None), needs_keys, nullable)


def resolve(name, encoder, options):
    """Complete and check the options of a method.

    Args:
        name: a registered method.
        encoder: `Encoder`.
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
    given = {key: value for key, value in options.items() if value is not None or key in method.nullable}
    settings = {key: value(encoder) if callable(value) else value for key, value in method.defaults.items()} | given
    check_attention(settings["attention"])
    if settings["batch"] not in (None, *BATCH_MODES):
        raise ValueError(f"batch {settings['batch']!r}: choose {' or '.join(BATCH_MODES)}")
    settings["layers"] = _layers_of(name, settings["layers"], encoder.depth, chosen="layers" in given)
    method.check(settings, encoder)
    return method, settings


def _layers_of(name, layers, depth, chosen):
    """`check_layers`, with a way out for those who chose none."""
    try:
        return check_layers(layers, depth)
    except ValueError as error:
        if chosen:
            raise
        raise ValueError(f"{name} merges by default in {error}; name other layers (--selected-layers)") from error


def check_layers(layers, depth):
    """Layers as a tuple, ascending; None: all.

    Raises:
        ValueError: a layer that is not there, or not in ascending order.
    """
    layers = range(1, depth + 1) if layers is None else layers if isinstance(layers, Iterable) else [layers]
    layers = tuple(layers)
    if not layers or not all(_is_index(layer) and 1 <= layer <= depth for layer in layers):
        raise ValueError(f"layers {list(layers)}: the encoder has layers 1 to {depth}")
    if any(first >= second for first, second in pairwise(layers)):
        raise ValueError(f"layers {list(layers)}: give each layer once, in ascending order")
    return tuple(int(layer) for layer in layers)


def _is_index(value):
    return isinstance(value, Integral) and not isinstance(value, bool)
