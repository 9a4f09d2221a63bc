"""Merging methods: their options in one table, their view of a model, and the registry of all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, get_args

from torch import Tensor

from g2tm import ATTENTION_MODES, BATCH_MODES, Reduction
from patch.attention import SoftMasking
from patch.option import Choice, Number, Option

if TYPE_CHECKING:
    from patch.look import Look

Place = Literal["attention", "block", "before"]
Options = Mapping[str, Any]  # name of an option -> its value in force
PLACES: tuple[Place, ...] = get_args(Place)
HALVES = ("attention", "mlp")  # of a block; values of the option `after`


@dataclass(frozen=True)
class ModelShape:
    """The number of blocks of a model, and the grid that it was made for: options are checked against them."""

    depth: int
    grid: tuple[int, int]


@dataclass(frozen=True)
class Step:
    """The view that a method has of one layer: patch tokens alone.

    Attributes:
        x: (B, N, D), the residual stream at the place of the method.
        grid: (gh, gw), patches of the padded image.
        native_grid: (gh, gw), patches of the images that the model was made for.
        n_prefix: number of prefix tokens, which the pass keeps in front of the patch tokens.
        sizes: (B, N), patches per token; None before the first merge.
        padding: (B, N), bool, True for slots that hold no token; None: there is no padding.
        soft_mask: (B, N), in the training of a method with masks, 1 for the tokens that count; None before its first
            step.
        layer, depth: this layer, 1-based, and how many there are.
        batch: "ragged" or "uniform".
        options: the options in force.
        block: the block itself, for its learned parts.
        encoder: the ViT, for its learned parts.
        look: at the attention of this block; None: it has not run.
    """

    x: Tensor
    grid: tuple[int, int]
    native_grid: tuple[int, int]
    n_prefix: int
    sizes: Tensor | None
    padding: Tensor | None
    soft_mask: Tensor | None
    layer: int
    depth: int
    batch: str
    options: Options
    block: Any
    encoder: Any
    look: "Look | None"

    @property
    def odd_first(self) -> bool:
        """True where an odd number of prefix tokens puts the first patch at an odd position of the sequence."""
        return self.n_prefix % 2 == 1

    @property
    def given(self) -> dict[str, Any]:
        """`sizes` and `padding`, as the functions of g2tm take them."""
        return {"sizes": self.sizes, "padding": self.padding}

    @property
    def input(self) -> Tensor:
        """(B, N, D), the input of this block; raises a ValueError, as the next six do, before the block."""
        return self._attended.input

    @property
    def normed(self) -> Tensor:
        """(B, N, D), the normalized input of this block's attention."""
        return self._attended.normed

    @property
    def queries(self) -> Tensor:
        """(B, N, head dim), queries of this block's attention averaged over the heads, float32."""
        return self._attended.queries

    @property
    def keys(self) -> Tensor:
        """(B, N, head dim), keys of this block's attention averaged over the heads, float32."""
        return self._attended.keys

    @property
    def values(self) -> Tensor:
        """(B, N, head dim), values of this block's attention averaged over the heads, float32."""
        return self._attended.values

    @property
    def cls_attention(self) -> Tensor:
        """(B, N), float32, attention of CLS to every token in this block, averaged over the heads."""
        return self._attended.cls_attention

    @property
    def received_attention(self) -> Tensor:
        """(B, N), float32, attention that every token gets in this block, averaged over heads and queries."""
        return self._attended.received_attention

    @property
    def _attended(self) -> "Look":
        if self.look is None:
            raise ValueError(f"layer {self.layer}: before the block nothing has attended yet, merge at another place")
        return self.look


@dataclass(frozen=True)
class LossInput:
    """The ingredients of the loss of a method, after a pass in training.

    Attributes:
        steps: layer -> what its soft form returned there.
        blocks: of the encoder.
        width: D.
        grid: (gh, gw), patches of the images.
        n_prefix: number of prefix tokens.
        options: the options in force.
        labels: (B, H, W), of the images; None: they have none.
        patch_size: pixels, (height, width).
    """

    steps: Mapping[int, Any]
    blocks: Sequence[Any]
    width: int
    grid: tuple[int, int]
    n_prefix: int
    options: Options
    labels: Tensor | None
    patch_size: tuple[int, int]


@dataclass(frozen=True)
class Method:
    """A merging method.

    Attributes:
        name: in the registry and for `--patch-type`.
        merge: from a `Step` to a `Reduction` of its patch tokens; None: nothing merges there.
        options: name -> `Option`.
        prepare: rewrites given options before they are checked one by one.
        check: raises a ValueError if options do not fit each other or the `ModelShape`.
        place: where it acts: "attention": between attention and MLP of a layer, or after the MLP where the method has
            the option `after` and it says so; "block": after the layer, 0 being before the first; "before": in front
            of the layer.
        needs_cls: whether it goes by the attention of CLS.
        modules: builds the learned parts under the published names, and returns the options that shape them; called
            with the encoder, its blocks and options.
        enabled_by: the option that says whether the learned parts choose; None: they always do, if there are any.
        training_form: what takes the place of `merge` in training: gradients reach the choice.
        soft_masking: of a soft form whose reductions have a `mask`: how it enters attention. It is used only where
            the learned parts choose.
        undo: where patches get their tokens back: "decoder": behind it; "encoder": before its last norm.
        loss: what the method adds to the loss of a training step in which it was soft.
        static: whether the number of tokens that are left never depends on the image; a budget makes any method so.
        summary: what it does, in one short sentence, for lists of methods.
    """

    name: str
    merge: Callable[[Step], Reduction | None]
    options: Mapping[str, Option]
    prepare: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    check: Callable[[Options, ModelShape], None] | None = None
    place: Place = "attention"
    needs_cls: bool = False
    modules: Callable[..., Mapping[str, Any] | None] | None = None
    enabled_by: str | None = None
    training_form: Callable[[Step], Reduction] | None = None
    soft_masking: SoftMasking | None = None
    undo: Literal["decoder", "encoder"] = "decoder"
    loss: Callable[[LossInput], Tensor] | None = None
    static: bool = False
    summary: str = ""

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise ValueError(f"{self.name} acts at place {self.place!r}: choose {', '.join(PLACES)}")
        if self.enabled_by is not None and self.enabled_by not in self.options:
            raise ValueError(f"{self.name} is enabled by {self.enabled_by}, which is none of its options")

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles look it up again."""
        return find, (self.name,)

    def is_static(self, options: Options) -> bool:
        """Return whether the number of tokens that are left does not depend on the image."""
        return self.static or options.get("tokens") is not None

    def uses_learned(self, options: Options) -> bool:
        """Return whether its learned parts choose; options: in force, or those that are given."""
        if self.modules is None or self.enabled_by is None:
            return self.modules is not None
        chosen = options.get(self.enabled_by)
        return bool(self.options[self.enabled_by].default if chosen is None else chosen)

    def trains_softly(self, options: Options) -> bool:
        """Return whether training uses its soft form: a form with masks only where its learned parts choose."""
        return self.training_form is not None and (self.soft_masking is None or self.uses_learned(options))

    def place_in(self, options: Options) -> Place:
        """Return where it acts with these options in force."""
        return "block" if options.get("after") == HALVES[1] else self.place

    def takes(self, option: str) -> bool:
        """Return whether it has an option of that name."""
        return option in self.options

    def check_names(self, given: Iterable[str]) -> None:
        """Raise a ValueError for options that it does not have."""
        unknown = sorted(set(given) - set(self.options))
        if unknown:
            raise ValueError(f"{self.name} takes no {', '.join(unknown)}: its options are {', '.join(self.options)}")


FIELDS = {field.name for field in fields(Method)} - {"name", "merge", "options"}
COMMON = {
    "layers": Option(
        None,
        "Layers in which to merge, counted from 1.",
        type=Number(low=0, integer=True),
        many=True,
        flag=("--selected-layer", "--selected-layers"),
        key=("selected_layer", "selected_layers"),
        default_text="all",
    ),
    "attention": Option(
        "none",
        "Weight of merged tokens as keys in later attention: add log(size) to their logits, do not, or subtract it.",
        type=Choice(ATTENTION_MODES),
        flag={"--prop-attn": "proportional", "--no-prop-attn": "none", "--iprop-attn": "inverse"},
    ),
    "batch": Option(
        "ragged",
        "Token counts of a batch. ragged: each image has its own; uniform: all have that of the one that merges least.",
        type=Choice(BATCH_MODES),
        flag="--batch-mode",
        key="batch_mode",
        default_text="uniform in training, else ragged",
    ),
}
METHODS: dict[str, Method] = {}
DEFAULT = "keymatch"  # that a model is patched with where none is named
PURE = "pure"  # no method: nothing merges


def register(name: str, merge: Callable[[Step], Reduction | None], **given: Any) -> Method:
    """Make a method available by name to `patch.apply` and to `--patch-type` of every command.

    Args:
        name, merge: see `Method`.
        given: other attributes of `Method`, such as `place`, `check` or `static`; and the options, an `Option` each.
            For the options that every method has (`layers`, `attention`, `batch`) just the default: `layers` None:
            every layer; `batch` None: uniform in training, ragged otherwise.

    Raises:
        ValueError: a name that is taken, or an option that another method has with another meaning.
    """
    if name in METHODS or name == PURE:
        raise ValueError(f"method {name!r} is registered already")
    table, attributes = dict(COMMON), {}
    for key, value in given.items():
        if isinstance(value, Option):
            table[key] = value
        elif key in COMMON:
            table[key] = replace(COMMON[key], default=value)
        elif key in FIELDS:
            attributes[key] = value
        else:
            raise ValueError(f"{name}: give its option {key} as an Option, with a default and a help text")
    for key, option in table.items():
        _check_alike(name, key, option)
    METHODS[name] = Method(name, merge, table, **attributes)
    return METHODS[name]


def _check_alike(name: str, key: str, option: Option) -> None:
    """One flag has one meaning: an option of several methods differs in default and help text alone."""
    try:
        meaning = option.meaning
    except ValueError as error:
        raise ValueError(f"{name}, {key}: {error}") from None
    for other in METHODS.values():
        if key in other.options and other.options[key].meaning != meaning:
            raise ValueError(f"{name}: {other.name} has an option {key} of another kind, flag or key")


def find(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in METHODS:
        raise ValueError(
            f"unknown method {name!r}: choose one of {', '.join(METHODS)}, or load the file of another (--plugin)"
        )
    return METHODS[name]


def complete(method: Method, shape: ModelShape, given: Mapping[str, Any]) -> dict[str, Any]:
    """Complete and check the options of a method.

    Args:
        method: registered or not.
        shape: of the model.
        given: options that were given. None means the default, unless the option has a None of its own.

    Returns:
        All options in force.

    Raises:
        ValueError: an unknown option, or a value that is not allowed.
    """
    method.check_names(given)
    given = {key: value for key, value in given.items() if value is not None or method.options[key].none is not None}
    given = method.prepare(given) if method.prepare is not None else given
    options = {}
    for key, option in method.options.items():
        value = given.get(key, option.default)
        value = value(shape) if callable(value) else value
        options[key] = None if value is None or option.means_none(value) else option.check(key, value)
    try:
        options["layers"] = check_layers(options["layers"], shape.depth, first=0 if method.place == "block" else 1)
    except ValueError as error:
        if "layers" in given:
            raise
        raise ValueError(
            f"{method.name} merges by default in {error}; name other layers (--selected-layers)"
        ) from error
    if method.check is not None:
        method.check(options, shape)
    return options


def check_layers(layers: int | Sequence[int] | None, depth: int, first: int = 1) -> tuple[int, ...]:
    """Layers as a tuple, ascending; None: all from 1.

    Raises:
        ValueError: a layer that is not there, or not in ascending order.
    """
    if layers is None:
        return tuple(range(1, depth + 1))
    given, layer = list(layers) if isinstance(layers, Sequence) else [layers], Number(first, depth, integer=True)
    try:
        checked = tuple(layer.check(one) for one in given)
    except ValueError:
        checked = ()
    if not checked:
        raise ValueError(f"layers {given}: the encoder has layers {first} to {depth}")
    if any(one >= other for one, other in pairwise(checked)):
        raise ValueError(f"layers {given}: give each layer once, in ascending order")
    return checked
