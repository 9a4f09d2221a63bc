"""What a merging method is: its options in one table, what it needs of a model, and the registry of all methods."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g2tm import ATTENTION_MODES, BATCH_MODES, Reduction

Place = Literal["attention", "block", "before", "ahead"]
PLACES: tuple[Place, ...] = ("attention", "block", "before", "ahead")
Placing = Place | Callable[[Mapping[str, Any]], Place]
NEEDS = ("input", "normed", "keys", "row", "means")


@dataclass(frozen=True)
class Number:
    """Type of an option: a number in a range, or one of some words.

    Attributes:
        low, high: the range, both ends included.
        integer: whether it counts something. None: an integer or a fraction, told apart by how it is written.
        words: what may be given instead.
        read: words that only a command line takes, which turns them into a number.
    """

    low: float = -math.inf
    high: float = math.inf
    integer: bool | None = False
    words: tuple[str, ...] = ()
    read: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """What may be typed in place of a number."""
        return self.words + self.read

    def parse(self, text: str) -> float | int | str:
        """The value that a text on the command line stands for; raises a ValueError that says what is allowed."""
        if text in self.names:
            return text
        try:
            whole = self.integer or (self.integer is None and text.lstrip("+-").isdigit())
            return self.check(int(text) if whole else float(text))
        except ValueError:
            raise ValueError(f"give {self.allowed}") from None

    def check(self, value: Any) -> Any:
        """The value; raises a ValueError that says what is allowed."""
        if isinstance(value, str) and value in self.words:
            return value
        is_number = isinstance(value, Integral if self.integer else Real) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high:
            raise ValueError(f"give {replace(self, read=()).allowed}")
        return int(value) if isinstance(value, Integral) else float(value)

    @property
    def allowed(self) -> str:
        """The range in words."""
        kind = "an integer" if self.integer else "a number"
        low, high = (f"{end:g}" for end in (self.low, self.high))
        ends = f" from {low}" if self.low > -math.inf else ""
        ends += f" {'to' if ends else 'up to'} {high}" if self.high < math.inf else ""
        return " or ".join((kind + ends, *self.names))


@dataclass(frozen=True)
class Choice:
    """Type of an option: one of some words, or true and false."""

    words: tuple[str | bool, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The words as they are typed."""
        return tuple(str(word).lower() if isinstance(word, bool) else word for word in self.words)

    def parse(self, text: str) -> str | bool:
        """The value that a text on the command line stands for."""
        return self.check(dict(zip(self.names, self.words, strict=True)).get(text, text))

    def check(self, value: Any) -> str | bool:
        """The value; raises a ValueError that says what is allowed."""
        if not any(type(value) is type(word) and value == word for word in self.words):  # 1 is not true
            raise ValueError(f"choose {self.allowed}")
        return value

    @property
    def allowed(self) -> str:
        """The words."""
        return " or ".join(self.names)


SIMPLE: dict[Any, Number | Choice] = {int: Number(integer=True), float: Number(), bool: Choice((True, False))}


@dataclass(frozen=True)
class Option:
    """One option of a method: keyword of `patch.apply`, flag of every command, key of `variant.yml`.

    Attributes:
        default: its value, or a function of the `Target`.
        help: what it means, with its unit.
        type: int, float, `Number`, `Choice`; None: that of the default.
        many: how many values it takes: False: one; True: one, or several in a list; a number: exactly so many.
        flag: its flag; None: its name. Two flags: the first takes one value, the second several. A mapping: switches,
            and the value that each stands for.
        key: its key in `variant.yml`; None: its name. Two keys: the first for one value, the second for several.
        none: what stands for None in flags and keys, where None is a value of its own; elsewhere None means the
            default.
    """

    default: Any
    help: str
    type: Any = None
    many: bool | int = False
    flag: str | tuple[str, str] | Mapping[str, Any] | None = None
    key: str | tuple[str, str] | None = None
    none: Any = None

    @property
    def kind(self) -> Number | Choice:
        """What checks one value."""
        given = self.type or type(self.default)
        if isinstance(given, Number | Choice):
            return given
        if given not in SIMPLE:
            raise ValueError(f"an option of type {given!r}: give int, float, Number or Choice")
        return SIMPLE[given]

    def means_none(self, value: Any) -> bool:
        """Whether a value stands for None."""
        return self.none is not None and (tuple(value) if isinstance(value, list) else value) == self.none

    def check(self, name: str, value: Any) -> Any:
        """The value as it is kept: one value, or a tuple (for exactly so many) or list of them.

        Raises:
            ValueError: it is not allowed; names the option, the value and what is allowed.
        """
        several = isinstance(value, Sequence) and not isinstance(value, str)
        try:
            if self.many is False or (self.many is True and not several):
                return self.kind.check(value)
            if not several or not value or (self.many is not True and len(value) != self.many):
                count = "one value or several" if self.many is True else f"{self.many} values"
                raise ValueError(f"give {count}, each {self.kind.allowed}")
            checked = [self.kind.check(one) for one in value]
            return checked if self.many is True else tuple(checked)
        except ValueError as error:
            raise ValueError(f"{name} {value!r}: {error}") from None


@dataclass(frozen=True)
class Target:
    """What the options are checked against: number of blocks, and the grid that the model was made for."""

    depth: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class Step:
    """What a method gets to see at one layer.

    Attributes:
        tokens: (B, P + N, D), the residual stream at the place of the method, prefix tokens first.
        input: (B, P + N, D), the input of this block; None unless the method needs it. So are the next four.
        normed: (B, P + N, D), the normalized input of this block's attention.
        keys: (B, P + N, head dim), keys of this block's attention averaged over the heads, float32.
        row: (B, P + N), float32, attention of CLS to every token in this block, averaged over the heads.
        means: (B, P + N), float32, attention that every token gets in this block, averaged over heads and queries.
        prefix: P, number of prefix tokens.
        grid: (gh, gw), patches of the padded image.
        made_for: (gh, gw), patches of the images that the model was made for.
        sizes: (B, N), patches per patch token, 0 for padding; None before the first merge.
        padded: whether there is padding.
        layer, depth: this layer, 1-based, and how many there are.
        batch: "ragged" or "uniform".
        options: the options in force.
        block: the block itself, for its learned parts.
        encoder: the ViT, for its learned parts.
        mask: (B, N), in the training of a method with masks, 1 for the tokens that count; None before its first step.
    """

    tokens: Tensor
    prefix: int
    grid: tuple[int, int]
    made_for: tuple[int, int]
    sizes: Tensor | None
    padded: bool
    layer: int
    depth: int
    batch: str
    options: Mapping[str, Any]
    block: nn.Module
    encoder: Any = None
    mask: Tensor | None = None
    input: Tensor | None = None
    normed: Tensor | None = None
    keys: Tensor | None = None
    row: Tensor | None = None
    means: Tensor | None = None

    @property
    def x(self) -> Tensor:
        """(B, N, D), the patch tokens alone."""
        return self.tokens[:, self.prefix :]

    @property
    def whole(self) -> dict[str, Any]:
        """What a function of the whole sequence is told: `prefix`, and `sizes`, (B, P + N), prefix tokens counting 1;
        None before the first merge."""
        sizes = None if self.sizes is None else F.pad(self.sizes, (self.prefix, 0), value=1.0)
        return {"sizes": sizes, "prefix": self.prefix}

    @property
    def sequence(self) -> dict[str, Any]:
        """`whole`, and whether there is padding, as `padded`."""
        return self.whole | {"padded": self.padded}

    @property
    def whole_mask(self) -> Tensor:
        """(B, P + N), float32, `mask` with prefix tokens counting 1; all 1 before the first step."""
        if self.mask is None:
            return torch.ones_like(self.tokens[..., 0], dtype=torch.float32)
        return F.pad(self.mask, (self.prefix, 0), value=1.0)


@dataclass(frozen=True)
class Masking:
    """How a mask enters the attention of a training step, see `g2tm.masked_softmax`.

    Attributes:
        epsilon, keeps_self: its arguments.
    """

    epsilon: float
    keeps_self: bool


@dataclass(frozen=True)
class Trained:
    """What the loss of a method is made of, after a pass in training.

    Attributes:
        steps: layer -> what its soft form returned there.
        blocks: of the encoder.
        width: D.
        grid: (gh, gw), patches of the images.
        prefix: number of prefix tokens.
        options: the options in force.
        labels: (B, H, W), of the images; None: they have none.
        patch_size: pixels, (height, width).
    """

    steps: Mapping[int, Any]
    blocks: Sequence[nn.Module]
    width: int
    grid: tuple[int, int]
    prefix: int
    options: Mapping[str, Any]
    labels: Tensor | None
    patch_size: tuple[int, int]


@dataclass(frozen=True)
class Method:
    """A merging method.

    Attributes:
        name: in the registry and for `--patch-type`.
        merge: from a `Step` to a `Reduction` of its patch tokens.
        options: name -> `Option`.
        prepare: rewrites given options before they are checked one by one.
        check: raises a ValueError if options do not fit each other or the `Target`.
        place: where it acts: "attention": between attention and MLP of a layer; "block": after the layer, 0 being
            before the first, for a method without needs; "before": in front of the layer; "ahead": after the layer,
            going by the attention that all tokens would have in the next one, which merged tokens reuse there; none
            after the last. A function of the options may say which.
        needs: what a `Step` has to hold besides the tokens, out of `NEEDS`; none for "before".
        modules: builds the learned parts under the published names; called with the encoder, its blocks and options.
        switch: the option that says whether the learned parts choose; None: they always do, if there are any.
        soft: what takes the place of `merge` in training: gradients reach the choice.
        masks: of a soft form whose reductions have a `mask`: how it enters attention. It is used only where the
            learned parts choose.
        undo: where patches get their tokens back: "decoder": behind it; "encoder": before its last norm.
        loss: what the method adds to the loss of a training step in which it was soft.
        static: whether the number of tokens that are left never depends on the image; a budget makes any method so.
        traceable: whether a trace of a static form merges other images as they want it; not where it leaves PyTorch.
    """

    name: str
    merge: Callable[[Step], Reduction]
    options: Mapping[str, Option]
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    check: Callable[[Mapping[str, Any], Target], None] | None = None
    place: Placing = "attention"
    needs: frozenset[str] = frozenset()
    modules: Callable[..., None] | None = None
    switch: str | None = None
    soft: Callable[[Step], Reduction] | None = None
    masks: Masking | None = None
    undo: Literal["decoder", "encoder"] = "decoder"
    loss: Callable[[Trained], Tensor] | None = None
    static: bool = False
    traceable: bool = True

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles look it up again."""
        return find, (self.name,)

    def place_of(self, options: Mapping[str, Any]) -> Place:
        """Where it acts under these options; raises a ValueError if a function names no place."""
        place = self.place(options) if callable(self.place) else self.place
        if place not in PLACES:
            raise ValueError(f"{self.name} acts at place {place!r}: choose {', '.join(PLACES)}")
        return place

    def is_static(self, options: Mapping[str, Any]) -> bool:
        """Whether the number of tokens that are left does not depend on the image."""
        return self.static or options.get("tokens") is not None

    def learns(self, options: Mapping[str, Any]) -> bool:
        """Whether its learned parts choose."""
        return self.modules is not None and (self.switch is None or bool(options.get(self.switch)))

    def softens(self, options: Mapping[str, Any]) -> bool:
        """Whether training uses its soft form: a form with masks only where its learned parts choose."""
        return self.soft is not None and (self.masks is None or self.learns(options))

    def takes(self, option: str) -> bool:
        """Whether it has an option of that name."""
        return option in self.options


COMMON = {
    "layers": Option(
        None,
        "Layers in which to merge, counted from 1.",
        type=Number(low=0, integer=True),
        many=True,
        flag=("--selected-layer", "--selected-layers"),
        key=("selected_layer", "selected_layers"),
    ),
    "attention": Option(
        "none",
        "How merged tokens count as keys in later attention: add log(size) to their logits, do not, or subtract it.",
        type=Choice(ATTENTION_MODES),
        flag={"--prop-attn": "proportional", "--no-prop-attn": "none", "--iprop-attn": "inverse"},
    ),
    "batch": Option(
        "ragged",
        "ragged: each image keeps its own number of tokens; uniform: all as many as the one that merges least.",
        type=Choice(BATCH_MODES),
        flag="--batch-mode",
        key="batch_mode",
    ),
}
METHODS: dict[str, Method] = {}


def register(
    name: str,
    merge: Callable[[Step], Reduction],
    *,
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    check: Callable[[Mapping[str, Any], Target], None] | None = None,
    place: Placing = "attention",
    needs: Iterable[str] = (),
    modules: Callable[..., None] | None = None,
    switch: str | None = None,
    soft: Callable[[Step], Reduction] | None = None,
    masks: Masking | None = None,
    undo: Literal["decoder", "encoder"] = "decoder",
    loss: Callable[[Trained], Tensor] | None = None,
    static: bool = False,
    traceable: bool = True,
    **options: Any,
) -> Method:
    """Make a method available by name to `patch.apply` and to `--patch-type` of every command.

    Args:
        name, merge, prepare, check, place, needs, modules, switch, soft, masks, undo, loss, static,
            traceable: see `Method`.
        options: an `Option` each; for the options that every method has (`layers`, `attention`, `batch`) just the
            default. `layers` None: every layer. `batch` None: uniform in training, ragged otherwise.

    Raises:
        ValueError: a name that is taken, or an option that another method has with another meaning.
    """
    if name in METHODS or name == "pure":
        raise ValueError(f"method {name!r} is registered already")
    if not callable(place) and place not in PLACES:
        raise ValueError(f"place {place!r}: choose {', '.join(PLACES)}")
    needs = frozenset(needs)
    unknown = sorted(needs - set(NEEDS))
    if unknown:
        raise ValueError(f"{name} needs {', '.join(unknown)}: a method may need {', '.join(NEEDS)}")
    if needs and place == "before":
        raise ValueError(f"{name} needs {', '.join(sorted(needs))}: in front of a layer nothing has attended yet")
    table = dict(COMMON)
    for option, value in options.items():
        if isinstance(value, Option):
            table[option] = value
        elif option in COMMON:
            table[option] = replace(COMMON[option], default=value)
        else:
            raise ValueError(f"{name}: give its option {option} as an Option, with a default and a help text")
    for option, entry in table.items():
        _check_alike(name, option, entry)
    parts: dict[str, Any] = {"modules": modules, "switch": switch, "soft": soft, "masks": masks, "loss": loss}
    parts |= {"undo": undo, "static": static, "traceable": traceable}
    METHODS[name] = Method(name, merge, table, prepare, check, place, needs, **parts)
    return METHODS[name]


def _check_alike(name: str, option: str, entry: Option) -> None:
    """One flag has one meaning: an option of several methods differs in default and help text alone."""
    try:
        meaning = _meaning(entry)
    except ValueError as error:
        raise ValueError(f"{name}, {option}: {error}") from None
    for other in METHODS.values():
        if option in other.options and _meaning(other.options[option]) != meaning:
            raise ValueError(f"{name}: {other.name} has an option {option} of another kind, flag or key")


def _meaning(option: Option) -> tuple[Any, ...]:
    return option.kind, option.many, option.flag, option.key


def find(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def resolve(name: str, target: Target, given: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """Complete and check the options of a method.

    Args:
        name: a registered method.
        target: `Target`.
        given: what the user gave; None means the method's default, unless the option has a None of its own.

    Returns:
        (method, all options in force).

    Raises:
        ValueError: unknown method or option, or a value that is not allowed.
    """
    method = find(name)
    unknown = sorted(set(given) - set(method.options))
    if unknown:
        raise ValueError(f"{name} takes no {', '.join(unknown)}: its options are {', '.join(method.options)}")
    given = {key: value for key, value in given.items() if value is not None or method.options[key].none is not None}
    given = method.prepare(given) if method.prepare is not None else given
    options = {}
    for key, option in method.options.items():
        value = given.get(key, option.default)
        value = value(target) if callable(value) else value
        options[key] = None if value is None or option.means_none(value) else option.check(key, value)
    first = 0 if method.place == "block" and not method.needs else 1  # before the first block nothing has attended
    try:
        options["layers"] = check_layers(options["layers"], target.depth, first)
    except ValueError as error:
        if "layers" in given:
            raise
        raise ValueError(f"{name} merges by default in {error}; name other layers (--selected-layers)") from error
    if method.check is not None:
        method.check(options, target)
    return method, options


def check_layers(layers: int | Sequence[int] | None, depth: int, first: int = 1) -> tuple[int, ...]:
    """Layers as a tuple, ascending; None: all from 1.

    Raises:
        ValueError: a layer that is not there, or not in ascending order.
    """
    layers = range(1, depth + 1) if layers is None else layers if isinstance(layers, Sequence) else [layers]
    layers = tuple(layers)
    inside = (
        isinstance(layer, Integral) and not isinstance(layer, bool) and first <= layer <= depth for layer in layers
    )
    if not layers or not all(inside):
        raise ValueError(f"layers {list(layers)}: the encoder has layers {first} to {depth}")
    if any(one >= other for one, other in pairwise(layers)):
        raise ValueError(f"layers {list(layers)}: give each layer once, in ascending order")
    return tuple(int(layer) for layer in layers)
