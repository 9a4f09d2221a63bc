"""Options of merging methods between command line, `variant.yml` and `patch.apply`; the registry states each once."""

import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.util import module_from_spec, spec_from_file_location
from inspect import signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from click.core import ParameterSource
from torch import Tensor, nn

import patch
from patch.method import PURE, ModelShape, Number, Option
from segm.cli import Command, Flag, Parsed, flags_of, value_of, word
from segm.config import RunConfig
from segm.errors import one_line
from segm.model.segmenter import Segmenter

PLUGIN = "--plugin"
TYPICAL = ModelShape(12, (32, 32))  # a default that depends on the model is shown for this one


def _options() -> dict[str, Option]:
    """Options of all methods registered now; those that share a name differ in default and help alone."""
    return {name: entry for method in patch.METHODS.values() for name, entry in method.options.items()}


def _flags(table: Mapping[str, Option]) -> list[Flag]:
    """All flags of some options; hidden, since --help shows those of one method."""
    flags: list[Flag] = []
    for name, entry in table.items():
        kind = entry.kind
        number = ("INTEGER" if kind.integer else "NUMBER",) if isinstance(kind, Number) else ()
        metavar = "|".join((*number, *kind.names)) + "..." * bool(entry.many)
        given = {"type": Parsed(kind.parse), "metavar": metavar, "hidden": True}
        flags += flags_of(name, entry.flag, entry.many, kind.names, **given)
    return flags


class PluginCommand(Command):
    """A command with --plugin: files of the user's own that register methods, loaded before anything else is read."""

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own, n_own = super().get_params(ctx), len(self.params)
        plugin = click.Option(
            [PLUGIN],
            multiple=True,
            expose_value=False,
            callback=_refuse_in_recipe,
            metavar="FILE.py",
            help="Python file of methods.  [default: none]",
        )
        return [*own[:n_own], plugin, *own[n_own:]]  # --help comes last

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = [part for word in args for part in (word.split("=", 1) if word.startswith(f"{PLUGIN}=") else (word,))]
        for flag, file in pairwise(words):
            if flag == PLUGIN:
                load_plugin(Path(file))
        return super().parse_args(ctx, args)


def _refuse_in_recipe(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    if ctx.get_parameter_source(str(param.name)) is ParameterSource.DEFAULT_MAP:
        raise click.BadParameter(f"a recipe runs no files: type {PLUGIN} in the command line", ctx, param)


def load_plugin(file: Path) -> None:
    """Run a Python file that registers methods, once in a process.

    Raises:
        ValueError: it is no Python file, or ends in an error; then none of its methods is registered.
    """
    if not (file.is_file() and file.suffix == ".py"):
        raise ValueError(f"{PLUGIN} {file}: give a Python file that is there, its name ends in .py")
    name, known = f"plugin {file.resolve()}", dict(patch.METHODS)
    if name in sys.modules:
        return
    spec = spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None  # of a .py
    module = sys.modules[name] = module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        patch.METHODS.clear()
        patch.METHODS.update(known)
        raise ValueError(f"{PLUGIN} {file}: {type(error).__name__}: {one_line(error)}") from error


class MergingCommand(PluginCommand):
    """A command with --patch-type and the flags of all methods that are registered when it runs.

    Its function gets them as `merging`: name of the option -> value, only those given, "patch_type" among them, and
    "preset", which `Run.load` reads. Where another method than that of the recipe (`ctx.default_map`) is given, the
    recipe says nothing about merging. --help shows the options of the method on the command line or in the recipe, else
    one line per method.
    """

    def __init__(self, *args: Any, groups: Mapping[str, Collection[str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, groups={**(groups or {}), "Merging": ["plugin", "preset", "patch_type"]}, **kwargs)

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        own = super().get_params(ctx)
        method = click.Option(
            ["--patch-type"],
            type=click.Choice([PURE, *patch.METHODS]),
            metavar="NAME",
            help="Method, or pure for none.  [default: the run's]",
        )
        preset = click.Option(
            ["--preset"],
            metavar="NAME",
            help="Setting that `g2tm tune` found.  [default: none]",
        )
        flags = [flag.parameter for flag in _flags(_options())]
        taken = {text for option in (*own, preset, method) for text in (*option.opts, option.name)}
        doubled = [flag.opts[0] for flag in flags if taken & {flag.opts[0], flag.name}]
        if doubled:
            raise click.UsageError(f"{', '.join(doubled)}: an option of a method is one of the command itself already")
        n_own = len(self.params) + 1  # and --plugin
        return [*own[:n_own], preset, method, *flags, *own[n_own:]]

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        ctx.params["merging"] = _take_merging(ctx)
        return rest

    def help_sections(self, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
        sections = super().help_sections(ctx)
        merging = sections.pop("Merging")
        name = self.typed(ctx, "patch_type") or (ctx.default_map or {}).get("patch_type")
        chosen = patch.METHODS.get(str(name))
        if chosen is None:
            merging += [(method.name, method.summary) for method in patch.METHODS.values()]
            return sections | {"Merging (for the options of a method add --patch-type NAME --help)": merging}
        merging += [(chosen.name, chosen.summary)]
        records = [_help_record(option, entry) for option, entry in chosen.options.items()]
        return sections | {
            "Merging": merging,
            f"Options of {chosen.name} (a run trained with it has its own defaults)": records,
        }


def _help_record(name: str, entry: Option) -> tuple[str, str]:
    """Flags of an option, and its help with the default."""
    flags, default = _flags({name: entry}), _default(entry)
    text, last = ", ".join(flag.text for flag in flags), flags[-1].parameter
    return text if last.is_flag else f"{text} {last.metavar}", entry.help + f"  [default: {default}]" * bool(default)


def _default(entry: Option) -> str:
    default = entry.default(TYPICAL) if callable(entry.default) else entry.default
    if default is None:
        return entry.default_text
    if isinstance(entry.flag, Mapping):
        return next(switch for switch, value in entry.flag.items() if value == default)
    words = " ".join(map(word, default if isinstance(default, list | tuple) else (default,)))
    return f"{words} of {TYPICAL.depth} layers" if callable(entry.default) else words


def _take_merging(ctx: click.Context) -> dict[str, Any]:
    """Move the parameters of merging out of `ctx.params`."""
    preset, method, table = ctx.params.pop("preset"), ctx.params.pop("patch_type"), _options()
    found: dict[str, dict[Flag, Any]] = {}
    for flag in _flags(table):
        value = ctx.params.pop(flag.name)
        if is_given(ctx, flag.name, method) and not (flag.parameter.is_flag and value is False):  # false: in a recipe
            found.setdefault(flag.option, {})[flag] = value
    merging = {name: one for name, one in (("preset", preset), ("patch_type", method)) if one is not None}
    return merging | {option: _or_none(table[option], value_of(ctx, given)) for option, given in found.items()}


def is_given(ctx: click.Context, name: str, method: str | None) -> bool:
    """Return whether a parameter that belongs to merging was typed, or is in a recipe for the same method."""
    source = ctx.get_parameter_source(name)
    in_recipe = source is ParameterSource.DEFAULT_MAP and (ctx.default_map or {}).get("patch_type") == method
    return in_recipe or source is ParameterSource.COMMANDLINE


def parse(words: Sequence[str], *own: click.Parameter) -> dict[str, Any]:
    """The argument `merging` of a `MergingCommand` for words such as ["--patch-type", "tome", "--r", "8"].

    Args:
        words: as typed.
        own: other options of the command.

    Returns:
        Name of the option -> value, of merging and of `own`, only what was given.

    Raises:
        ValueError: unknown options or values.
    """
    try:
        params = MergingCommand(None, params=[*own], add_help_option=False).make_context("merging", [*words]).params
    except click.ClickException as error:
        raise ValueError(error.format_message()) from error
    return params.pop("merging") | {name: value for name, value in params.items() if value is not None}


def choose(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
    """The merging method and its options: first those given, then those that a checkpoint was trained with.

    Args:
        given: the argument `merging` of a `MergingCommand`.
        saved: `dataset_kwargs` of a `variant.yml`, or None. Its options count unless another method is given.

    Returns:
        (method, options) for `apply`; method is "pure" for none. Options that are set in neither are left out.

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
    unknown = [name for name in own if name not in table]
    if unknown:
        raise ValueError(f"{_typed(unknown)}: {method} takes {_typed(table)}")
    for name, value in own.items():
        kind = table[name].kind
        if isinstance(kind, Number) and value in kind.read:
            raise ValueError(f"{_typed([name])} {value}: give it to train.py, with --from and an unpatched checkpoint")
    kept = read_variant(saved)[1] if method == saved_method else {}
    for name, value in (learned_parts(method, own) or {}).items():
        if kept.get(name, value) != value:
            raise ValueError(
                f"{_typed([name])} {value}: {method} has learned with {kept[name]}, start without its weights"
            )
    return method, kept | own


def _typed(options: Iterable[str]) -> str:
    """Options as a user types them."""
    flags = _flags(_options())
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
        value, keys = options.get(name), _keys(name, entry)
        value = entry.none if value is None else value
        value = [*value] if isinstance(value, tuple) else value
        if len(keys) == 2 and isinstance(value, list) and len(value) == 1:
            (value,) = value
        if value is not None:
            entries[keys[-1] if isinstance(value, list) else keys[0]] = value
    return entries


def _keys(name: str, entry: Option) -> tuple[str, ...]:
    """Keys in `variant.yml`: one, or a first for one value and a second for several."""
    return entry.key if isinstance(entry.key, tuple) else (entry.key or name,)


def _or_none(entry: Option, value: Any) -> Any:
    """The value in Python: a tuple if the number of values is fixed, and None for values that mean it."""
    if entry.means_none(value):
        return None
    return tuple(value) if isinstance(value, list) and not isinstance(entry.many, bool) else value


def apply(model: Segmenter, method: str, options: Mapping[str, Any]) -> Segmenter:
    """Patch a Segmenter with a method and options from `choose`; "pure" leaves it as it is.

    Raises:
        ValueError: as `patch.apply`, and for a model without the method's learned parts.
    """
    if learned_parts(method, options) is not None and not patch.has_modules(model.encoder, method):
        raise ValueError(f"{method} has learned parts, which this model lacks: train them with train.py --finetune")
    return patch.apply(model, method, **options)


def compile_network(model: Segmenter) -> Callable[[Tensor], Any]:
    """`Segmenter.network` of a model, compiled for inference.

    It is one graph; where the image decides how many tokens are left, one from each merge to the next
    (`patch.compile`, in place). The next call may overwrite its output.
    """
    if patch.is_patched(model) and not patch.find(patch.method(model)).is_static(patch.options(model)):
        return patch.compile(model).network
    return torch.compile(model.network, mode="reduce-overhead")


def of_model(model: nn.Module) -> dict[str, Any]:
    """`to_variant` of a model, patched or not."""
    return to_variant(patch.method(model), patch.options(model)) if patch.is_patched(model) else to_variant(PURE, {})


def learned_parts(method: str, options: Mapping[str, Any]) -> dict[str, Any] | None:
    """`net_kwargs["reduction"]` of a model that learns with a method: see `_shape`; None: it has no learned parts."""
    return _shape(method, options) if method != PURE and patch.find(method).uses_learned(options) else None


def _shape(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Name of a method, and the options that shape its learned parts."""
    build = patch.find(method).modules
    own = {name: options[name] for name in signature(build).parameters if name in options} if build else {}
    return {"name": method} | {name: list(v) if isinstance(v, tuple) else v for name, v in own.items()}


def build_model(net_kwargs: Mapping[str, Any], pretrained: bool | str = False) -> Segmenter:
    """As `create_segmenter`, with the learned parts of the method that `net_kwargs["reduction"]` names, if any.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `create_segmenter`, and for an unknown method.
    """
    from segm.model.factory import create_segmenter  # here, for timm is slow to import

    return create_segmenter(net_kwargs, pretrained, parts=add_parts)


def first_model(config: RunConfig, weights: bool | str | Path, finetune: str | Path | None) -> Segmenter:
    """The model of a training with its first weights; parts of a method that its first run lacks begin at random.

    Args:
        config: of the training, with its classes.
        weights: of the encoder, see `build_model`.
        finetune: checkpoint or run that all weights come from.

    Raises:
        ValueError, FileNotFoundError, ConnectionError: as `build_model` and `copy_weights`.
    """
    from segm.model.factory import copy_weights

    if finetune is None:
        return build_model(config.net_kwargs, weights)
    source = RunConfig.read(finetune)
    model = build_model(config.with_values(reduction=source.net.reduction).net_kwargs)
    copy_weights(model, finetune, same_classes=source.class_names in (None, config.class_names))
    if not source.net.reduction and config.net.reduction is not None:
        add_parts(model.encoder, config.net.reduction)
    return model


def add_parts(encoder: nn.Module, reduction: Mapping[str, Any]) -> nn.Module:
    """Build the learned parts that `net_kwargs["reduction"]` describes into an encoder.

    Raises:
        ValueError: no method, an unknown one, or options that do not shape its parts.
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


def assignment_of(reduction: patch.Reduction) -> np.ndarray | None:
    """Token of every patch of the first image, (N,), int64; None for a method whose tokens are no groups of patches.

    Where patches are mixed from several tokens, it is the nearest one.
    """
    assignment = getattr(reduction, "assignment", None)
    assignment = getattr(reduction, "nearest", None) if assignment is None else assignment
    return None if assignment is None else assignment[0].cpu().numpy()


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


def layer_tokens(model: Segmenter) -> dict[int, float]:
    """Patch tokens that each merging layer left in the last pass, mean over its images: layer -> number."""
    return {layer: step.counts.double().mean().item() for layer, step in patch.reductions(model).items()}


def mean_tokens(model: Segmenter, batches: Iterable[Tensor]) -> float:
    """Patch tokens that an image keeps, mean over the images of all batches (B, 3, H, W)."""
    return torch.cat([count_tokens(model, batch) for batch in batches]).double().mean().item()
