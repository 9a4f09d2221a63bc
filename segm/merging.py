"""A method's options between command line, `variant.yml` and `patch.apply`: all from the registry's tables."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

import click
import torch
from click.core import ParameterSource
from torch import Tensor, nn

import patch
from patch.method import Choice, Number, Option
from segm.cli import Command, Numbers
from segm.model.factory import create_segmenter
from segm.model.segmenter import Segmenter

PURE = "pure"


class Value(click.ParamType):
    """One value of a method's option."""

    name = "value"

    def __init__(self, kind: Number | Choice) -> None:
        self.kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.kind.parse(_word(value))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


class Flag(NamedTuple):
    """A flag of a method's option. option: its name; parameter: the flag for click; read: from its value to that of
    the option."""

    option: str
    parameter: click.Option
    read: Callable[[Any], Any]

    @property
    def text(self) -> str:
        """As it is typed."""
        return self.parameter.opts[0]


def _flags() -> Iterator[Flag]:
    """The flags of all methods that are registered now."""
    for name, users in _users().items():
        entry, text = next(iter(users.values())), _help(users)
        flag = entry.flag or "--" + name.replace("_", "-")
        if isinstance(flag, Mapping):
            first = next(iter(flag))
            for switch, value in flag.items():
                what = f"{text}  [{value}]" if switch == first else f"As {first}.  [{value}]"
                yield _switch(switch, name, value, what)
            continue
        if isinstance(flag, tuple):
            yield _flag(flag[0], name, entry, text, many=False)
            flag, text = flag[1], f"As {flag[0]}, one value or several."
        yield _flag(flag, name, entry, text, entry.many)


def _flag(flag: str, name: str, entry: Option, text: str, many: bool | int) -> Flag:
    kind, count = entry.kind, 1 if isinstance(many, bool) else many
    number = ("INTEGER" if kind.integer else "NUMBER",) if isinstance(kind, Number) else ()
    shown: dict[str, Any] = {
        "type": Value(kind),
        "help": text,
        "metavar": "|".join((*number, *kind.names)) + "..." * bool(many),
    }
    if many is True:
        several = Numbers([flag], words=kind.names, **shown)
        return Flag(name, several, lambda found: _or_none(entry, [*found] if found[1:] else found[0]))
    return Flag(name, click.Option([flag], nargs=count, **shown), partial(_or_none, entry))


def _switch(flag: str, name: str, value: Any, text: str) -> Flag:
    return Flag(name, click.Option([flag], is_flag=True, default=None, help=text), lambda _: value)


def _users() -> dict[str, dict[str, Option]]:
    """option -> method -> the method's entry."""
    users: dict[str, dict[str, Option]] = {}
    for method in patch.METHODS.values():
        for name, entry in method.options.items():
            users.setdefault(name, {})[method.name] = entry
    return users


def _help(users: Mapping[str, Option]) -> str:
    """One line: the methods with their defaults, and what the option means to them."""
    meanings: dict[str, list[str]] = {}
    for method, entry in users.items():
        values = entry.default if isinstance(entry.default, list | tuple) else (entry.default,)
        known = entry.default is not None and not callable(entry.default)
        default = f" ({' '.join(map(_word, values))})" if known else ""
        meanings.setdefault(entry.help, []).append(method + default)
    return " ".join(f"{', '.join(methods)}: {meaning}" for meaning, methods in meanings.items())


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


class MergingCommand(Command):
    """A command with --patch-type and the flags of all methods that are registered when it runs.

    Its function gets them as one argument `merging`: name of the option -> value, only what was given, "patch_type"
    among them. With another method than that of the recipe (`ctx.default_map`), nothing in the recipe about merging
    counts.
    """

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        method = click.Option(
            ["--patch-type"],
            type=click.Choice([PURE, *patch.METHODS]),
            help="Merging method; pure: none. It and its options default to what the checkpoint was trained with.",
        )
        flags = [flag.parameter for flag in _flags()]
        taken = {text for option in (*own, method) for text in (*option.opts, option.name)}
        doubled = [flag.opts[0] for flag in flags if taken & {flag.opts[0], flag.name}]
        if doubled:
            raise click.UsageError(f"{', '.join(doubled)}: an option of a method is one of the command itself already")
        n_own = len(self.params)
        return [*own[:n_own], method, *flags, *own[n_own:]]  # --help comes last

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        ctx.params["merging"] = _take_merging(ctx)
        return rest


def _take_merging(ctx: click.Context) -> dict[str, Any]:
    """Move the parameters of merging out of `ctx.params`."""
    method = ctx.params.pop("patch_type")
    merging = {} if method is None else {"patch_type": method}
    found: dict[str, dict[str, tuple[Flag, Any]]] = {}
    for flag in _flags():
        name = flag.parameter.name
        value = ctx.params.pop(name)
        if is_given(ctx, name, method) and not (flag.parameter.is_flag and value is False):  # false: in a recipe
            found.setdefault(flag.option, {})[name] = flag, value
    for option, given in found.items():
        typed = {name: given[name] for name in given if _is_typed(ctx, name)} or given
        if len(typed) > 1:
            raise click.UsageError(f"{' and '.join(flag.text for flag, _ in typed.values())}: choose one of them")
        ((flag, value),) = typed.values()
        merging[option] = flag.read(value)
    return merging


def is_given(ctx: click.Context, name: str, method: str | None) -> bool:
    """Whether a parameter that belongs to merging was typed, or stands in a recipe for the same method."""
    if ctx.get_parameter_source(name) is ParameterSource.DEFAULT_MAP:
        return (ctx.default_map or {}).get("patch_type") == method
    return _is_typed(ctx, name)


def _is_typed(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def parse(words: Sequence[str], *own: click.Parameter) -> dict[str, Any]:
    """What a `MergingCommand` makes of words such as ["--patch-type", "tome", "--r", "8"].

    Args:
        words: as typed.
        own: other options, which stand beside those of merging where they are given.

    Raises:
        ValueError: unknown options or values.
    """
    try:
        params = MergingCommand(None, params=[*own], add_help_option=False).make_context("merging", [*words]).params
    except click.ClickException as error:
        raise ValueError(error.format_message()) from error
    return params.pop("merging") | {name: value for name, value in params.items() if value is not None}


def choose(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """The merging method and its options: what was given, then what a checkpoint was trained with.

    Args:
        given: the argument `merging` of a `MergingCommand`.
        saved: `dataset_kwargs` of a `variant.yml`, or None. Its options count unless another method is given.

    Returns:
        (method, options) for `apply`; method is "pure" for none. Options that nobody set are left out.

    Raises:
        ValueError: an option that the method does not take, or a word that only train.py understands.
    """
    saved = saved or {}
    own = {name: value for name, value in given.items() if name != "patch_type"}
    saved_method = saved.get("patch_type") or PURE
    method = given.get("patch_type") or saved_method
    if method == PURE:
        if own:
            raise ValueError(f"{_typed(own)}: nothing merges without --patch-type {{{','.join(patch.METHODS)}}}")
        return PURE, {}
    table = patch.find(method).options
    if not own.keys() <= table.keys():
        unknown = [name for name in own if name not in table]
        raise ValueError(f"{_typed(unknown)}: {method} takes {_typed(table)}")
    for name, value in own.items():
        kind = table[name].kind
        if isinstance(kind, Number) and value in kind.read:
            raise ValueError(f"{_typed([name])} {value}: give it to train.py, with --from and an unpatched checkpoint")
    kept = read_variant(saved)[1] if method == saved_method else {}
    for name, value in (learned_parts(method, own) or {}).items():
        if name in kept and kept[name] != value:
            raise ValueError(
                f"{_typed([name])} {value}: {method} has learned with {kept[name]}, start without its weights"
            )
    return method, kept | own


def _typed(options: Iterable[str]) -> str:
    """Options as a user types them."""
    flags = [*_flags()]
    return ", ".join(text for name in options for text in [f.text for f in flags if f.option == name] or [name])


def read_variant(saved: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Method and options of a training.

    Args:
        saved: `dataset_kwargs` of a `variant.yml`.

    Returns:
        (method, options) for `apply`, as from `choose`.

    Raises:
        ValueError: an unknown method.
    """
    method = saved.get("patch_type") or PURE
    if method == PURE:
        return PURE, {}
    options = {"attention": "none"}  # released models do not say: those that were trained with ToMe learned without
    for name, entry in patch.find(method).options.items():
        value = next((saved[key] for key in reversed(_keys(name, entry)) if saved.get(key) not in (None, [])), None)
        if value is not None:
            options[name] = _or_none(entry, value)
    return method, options


def to_variant(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `dataset_kwargs` that `read_variant` reads again.

    Args:
        method: name, or "pure".
        options: from `patch.options`, empty for "pure".
    """
    entries: dict[str, Any] = {"patch_type": method, "threshold": None}
    if method == PURE:
        return entries | {"selected_layer": None}
    for name, entry in patch.find(method).options.items():
        value = entry.none if options.get(name) is None else options[name]
        values = list(value) if isinstance(value, list | tuple) else [value]
        if value is not None:
            one, *several = _keys(name, entry)
            single = len(values) == 1 and (several or value is values[0])
            entries[one if single or not several else several[0]] = values[0] if single else values
    return entries


def without(saved: Mapping[str, Any]) -> dict[str, Any]:
    """`dataset_kwargs` of a `variant.yml` without what they say of merging."""
    known = {key for name, users in _users().items() for entry in users.values() for key in _keys(name, entry)}
    return {key: value for key, value in saved.items() if key not in known | {"patch_type"}}


def _keys(name: str, entry: Option) -> tuple[str, ...]:
    """Keys in `variant.yml`: one, or that for one value and that for several."""
    return entry.key if isinstance(entry.key, tuple) else (entry.key or name,)


def _or_none(entry: Option, value: Any) -> Any:
    """The value in Python: a tuple if their number is fixed, and None for what stands for it."""
    if entry.means_none(value):
        return None
    return tuple(value) if isinstance(value, list) and not isinstance(entry.many, bool) else value


def apply(model: Segmenter, method: str, options: Mapping[str, Any]) -> Segmenter:
    """Patch a Segmenter with what `choose` returned; "pure" leaves it as it is.

    Raises:
        ValueError: as `patch.apply`, and for a model without the method's learned parts.
    """
    if method != PURE:
        if patch.find(method).uses_learned(options) and not patch.has_modules(model.encoder, method):
            raise ValueError(f"{method} has learned parts, which this model lacks: train them with train.py --finetune")
        patch.apply(model, method, **options)
    return model


def compile_network(model: Segmenter) -> Callable[[Tensor], Any]:
    """`Segmenter.network` of a model, compiled for inference: one graph, or, where the image decides how many tokens
    are left, one from each merge to the next (`patch.compile`, in place). The next call may overwrite what it gives."""
    if patch.is_patched(model) and not patch.find(patch.method(model)).is_static(patch.options(model)):
        return patch.compile(model).network
    return torch.compile(model.network, mode="reduce-overhead")


def of_model(model: nn.Module) -> dict[str, Any]:
    """What `to_variant` says of a model, patched or not."""
    return to_variant(patch.method(model), patch.options(model)) if patch.is_patched(model) else to_variant(PURE, {})


def learned_parts(method: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """`net_kwargs["reduction"]` of a model that learns with a method: its name and the options that shape its parts.

    None if the method has no learned parts.
    """
    return _shape(method, options) if method != PURE and patch.find(method).uses_learned(options) else None


def _shape(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A method's name, and those of the options that its learned parts are built by."""
    build = patch.find(method).modules
    own = {name: options[name] for name in signature(build).parameters if name in options} if build else {}
    return {"name": method} | {name: list(v) if isinstance(v, tuple) else v for name, v in own.items()}


def build_model(net_kwargs: Mapping[str, Any], pretrained: bool | str = False) -> Segmenter:
    """A Segmenter with the learned parts of the method that `net_kwargs["reduction"]` names, if it names one.

    Args:
        net_kwargs, pretrained: see `create_segmenter`.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `create_segmenter`, and for an unknown method.
    """
    return create_segmenter(net_kwargs, pretrained, parts=add_parts)


def add_parts(encoder: nn.Module, reduction: Mapping[str, Any]) -> nn.Module:
    """Build the learned parts that `net_kwargs["reduction"]` describes into an encoder.

    Raises:
        ValueError: no method, an unknown one, or something that does not shape its parts.
    """
    if not isinstance(reduction, Mapping) or "name" not in reduction:
        raise ValueError(f"net_kwargs: reduction {reduction!r} is no mapping with the name of a method")
    known = _shape(reduction["name"], reduction)
    if known != reduction or patch.find(reduction["name"]).modules is None:
        raise ValueError(
            f"net_kwargs: reduction {dict(reduction)} does not fit the learned parts of {reduction['name']}"
        )
    return patch.add_modules(encoder, known.pop("name"), **known)


def method_of(model: nn.Module) -> str:
    """Name of the method in force, "pure" for none."""
    return patch.method(model) if patch.is_patched(model) else PURE


@torch.inference_mode()
def count_tokens(model: Segmenter, images: Tensor) -> Tensor:
    """Patch tokens that are left at the end of the encoder.

    Args:
        model: patched or not.
        images: (B, 3, H, W).

    Returns:
        (B,), int64, on the CPU.
    """
    model.network(images)
    reduction = patch.reduction(model) if patch.is_patched(model) else None
    if reduction is not None:
        return reduction.counts.cpu()
    return torch.full((len(images),), math.prod(model.grid(images.shape[-2:])))


def mean_tokens(model: Segmenter, batches: Iterable[Tensor]) -> float:
    """Patch tokens that an image keeps, mean over the images of all batches (B, 3, H, W)."""
    return torch.cat([count_tokens(model, batch) for batch in batches]).double().mean().item()
