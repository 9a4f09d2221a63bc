"""Click plumbing of all commands: one-line errors, help with headings, lists of values, common options, tables."""

import io
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from click.core import ParameterSource

from segm import parallel
from segm.checkpoint import CHOICES
from segm.config import SCALES, SETTINGS, config_dir
from segm.data import DATASETS
from segm.errors import brief, one_line
from segm.sharing import find
from segm.sizes import short
from segm.storage import read_yaml

LONGEST = 2000  # characters of an error: lists of classes have their place
POSITIVE, COUNT = click.IntRange(min=1), click.IntRange(min=0)
ABOVE_ZERO = click.FloatRange(min=0, min_open=True)
FILE, FOLDER = click.Path(dir_okay=False, path_type=Path), click.Path(file_okay=False, path_type=Path)
MEMORY = "no {} left: give a smaller --batch-size, --crop-size, --im-size or --num-workers"
WORDS = "segm.words"  # in `Context.meta`: the words of the command line
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Numbers(click.Option):
    """An option that takes all numbers that follow it: `--selected-layers 1 5`; and some words, if there are any."""

    def __init__(self, *args: Any, words: Collection[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"multiple": True})
        self.words = words

    def takes(self, text: str) -> bool:
        """Return whether a word of the command line is one of its values."""
        return text in self.words or _is_number(text)

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        # A file of settings may give one number without a list.
        return super().type_cast_value(ctx, [value] if isinstance(value, int | float | str) else value)


class Flag(NamedTuple):
    """A flag of an option that may have several: the option, the flag for click, and the value of a switch."""

    option: str
    parameter: click.Option
    value: Any = None

    @property
    def name(self) -> str:
        """Name in `Context.params`."""
        return str(self.parameter.name)

    @property
    def text(self) -> str:
        """The flag as a user types it."""
        return self.parameter.opts[0]


def flags_of(
    option: str,
    flag: str | tuple[str, str] | Mapping[str, Any] | None,
    many: bool | int,
    words: Collection[str],
    **given: Any,
) -> list[Flag]:
    """The flags of an option.

    Args:
        option: its name.
        flag: None: its name. Two: the first takes one value, the second several. A mapping: switch -> value.
        many: number of values; False: one; True: one or several.
        words: values besides numbers.
        given: further arguments of `click.Option`.
    """
    if isinstance(flag, Mapping):
        hidden = given.get("hidden", False)
        switches = {text: click.Option([text], is_flag=True, default=None, hidden=hidden) for text in flag}
        return [Flag(option, switches[text], value) for text, value in flag.items()]
    if isinstance(flag, tuple):
        return [Flag(option, click.Option([flag[0]], **given)), Flag(option, Numbers([flag[1]], words=words, **given))]
    texts = [flag or "--" + option.replace("_", "-")]
    if many is True:
        return [Flag(option, Numbers(texts, words=words, **given))]
    return [Flag(option, click.Option(texts, nargs=many or 1, **given))]


def value_of(ctx: click.Context, given: Mapping[Flag, Any]) -> Any:
    """The value of an option from the values of its flags: from those typed, else from those of a recipe.

    Raises:
        click.UsageError: several flags.
    """
    typed = [flag for flag in given if ctx.get_parameter_source(flag.name) is ParameterSource.COMMANDLINE]
    chosen = typed or [*given]
    if len(chosen) > 1:
        raise click.UsageError(f"{' and '.join(flag.text for flag in chosen)}: choose one of them")
    (flag,) = chosen
    if flag.parameter.is_flag:
        return flag.value
    value = given[flag]
    return value if not flag.parameter.multiple else [*value] if value[1:] else value[0]


class Sides(Numbers):
    """A size in pixels: one number, or height and width; (height, width) unless it is a square."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"metavar": "SIDE|HEIGHT WIDTH"} | kwargs | {"type": POSITIVE})

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        sides = super().type_cast_value(ctx, value)
        if len(sides) > 2:
            raise click.BadParameter(f"{len(sides)} numbers: give one, or height and width", ctx, self)
        return short(sides[0] if len(sides) == 1 else sides) if sides else None


class Several(Numbers):
    """An option that takes one or more numbers; a tuple, or None where it is not given."""

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        return super().type_cast_value(ctx, value) or None


class Command(click.Command):
    """A command whose wrong input ends in one line and a status other than 0, and whose help has headings.

    Args:
        groups: heading -> names of the parameters that --help shows below it. Others come first, below "Options".
    """

    def __init__(self, *args: Any, groups: Mapping[str, Collection[str]] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"context_settings": {"show_default": True}})
        self.groups = groups or {}

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        options = [option for option in self.get_params(ctx) if isinstance(option, Numbers)]
        words = repeat_option(args, {name: option.takes for option in options for name in option.opts})
        ctx.meta[WORDS] = tuple(words)
        return super().parse_args(ctx, words)

    def typed(self, ctx: click.Context, name: str) -> Any:
        """The text of a parameter on the command line, though it is not read yet, as in --help; None: not there."""
        return self.make_parser(ctx).parse_args([*ctx.meta.get(WORDS, ())])[0].get(name)

    def help_sections(self, ctx: click.Context) -> dict[str, list[tuple[str, str]]]:
        """Heading -> options below it, each as (flags, help)."""
        heading = {name: heading for heading, names in self.groups.items() for name in names}
        sections: dict[str, list[tuple[str, str]]] = {name: [] for name in ("Options", *self.groups)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx) if isinstance(parameter, click.Option) else None
            if record is not None:
                sections[heading.get(parameter.name or "", "Options")].append(record)
        return sections

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, records in self.help_sections(ctx).items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        # Pillow warns of large pictures; those above twice its limit are refused.
        warnings.filterwarnings("ignore", message="Image size")
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # class names may have letters that the terminal does not know
                stream.reconfigure(errors="backslashreplace")
        with _one_line_errors():
            return super().invoke(ctx)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors of files, values and usage end in one line of bounded length, without the usage that click prints."""
    try:
        yield
    except (click.ClickException, ValueError, OSError) as error:
        click_error = isinstance(error, click.ClickException)
        message = one_line(error.format_message(), LONGEST) if click_error else _message(error)
        if parallel.report_failure(f"Error: {message}"):
            raise SystemExit(1) from error
        kind = click.UsageError if isinstance(error, click.UsageError) else click.ClickException
        raise kind(message) from error  # without its context, from which click prints the usage
    except MemoryError as error:
        raise click.ClickException(MEMORY.format("memory")) from error
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
            raise click.ClickException(MEMORY.format("memory")) from error
        if "shared memory" in text or "DataLoader worker" in text:
            raise click.ClickException(f"{MEMORY.format('/dev/shm')}; {one_line(text)}") from error
        if parallel.is_peer_failure(error) and parallel.report_failure("Error: another process ended", follows=True):
            raise SystemExit(1) from error
        raise


def _message(error: BaseException) -> str:
    """The message in one line; of an error in a data loader's worker, which carries its traceback, only the end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and "Traceback" in str(error):
        lines = [lines[-1].partition(": ")[2] or lines[-1]]
    return one_line(" ".join(lines), LONGEST)


def repeat_option(args: Iterable[str], names: Mapping[str, Callable[[str], bool]]) -> list[str]:
    """`--layers 1 5` -> `--layers 1 --layers 5`: click has no open-ended options.

    Args:
        args: words of the command line.
        names: option -> whether a word is one of its values.
    """
    repeated: list[str] = []
    current = None
    for arg in _split_equals(args, names):
        if current is None or not names[current](arg):
            current = arg if arg in names else None
            repeated = _without(repeated, arg) if current else repeated  # the last occurrence counts, as of any option
        elif repeated[-1] != current:
            repeated.append(current)
        repeated.append(arg)
    return repeated


def _without(words: list[str], name: str) -> list[str]:
    """The words without an option and its values."""
    return [word for before, word in zip(["", *words], words, strict=False) if name not in (before, word)]


def _split_equals(args: Iterable[str], names: Collection[str]) -> Iterator[str]:
    """`--layers=1` -> `--layers 1` for the options in `names`."""
    for arg in args:
        name, equals, value = arg.partition("=")
        yield from (name, value) if equals and name in names else (arg,)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def word(value: Any) -> str:
    """A value as a user types it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


class Parsed(click.ParamType):
    """A value read by a function from its text; the ValueError of the function says what is allowed."""

    name = "value"

    def __init__(self, parse: Callable[[str], Any]) -> None:
        self.parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(word(value))
        except ValueError as error:
            self.fail(f"{value!r}: {error}", param, ctx)


class Device(click.ParamType):
    """An available device of torch."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> torch.device:
        try:
            device = torch.device(value)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            self.fail(f"{value!r} is not available here: {str(error).splitlines()[0]}", param, ctx)
        return device


class Listed(click.ParamType):
    """Values separated by commas.

    Args:
        convert: from a text to a value; numbers have to be 1 or more.
        allowed: gives the values to choose from; None: any.
    """

    name = "list"

    def __init__(self, convert: Callable[[str], Any], allowed: Callable[[], Collection[Any]] | None = None) -> None:
        self.convert_one, self.allowed = convert, allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        try:
            values = tuple(self.convert_one(part.strip()) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: give numbers with commas between them, such as 1,8", param, ctx)
        unknown = [one for one in values if self.allowed is not None and one not in self.allowed()]
        if unknown or any(isinstance(one, int) and one < 1 for one in values):
            allowed = "numbers from 1" if self.allowed is None else ", ".join(self.allowed())
            self.fail(f"{value!r}: choose from {allowed}", param, ctx)
        return values


class Images(click.ParamType):
    """A data set by name, or a folder of photographs."""

    name = "images"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        if value in DATASETS or isinstance(value, Path):
            return value
        if not Path(value).is_dir():
            self.fail(f"{value!r}: give a folder of photographs, or one of {', '.join(DATASETS)}", param, ctx)
        return Path(value)


TITLES = {"net": "Network", "data": "Data", "optim": "Optimizer", "schedule": "Schedule", "inference": "Evaluation"}
SETTING_GROUPS = {
    title: [name for name, (part, entry) in SETTINGS.items() if part == key and entry.metadata["help"]]
    for key, title in TITLES.items()
}


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: an option for each setting of `segm.config` that has a help text, None where it is not given."""
    for name, (_, entry) in reversed(SETTINGS.items()):
        kind, about = entry.metadata["kind"], entry.metadata
        if about["help"]:
            flag = about.get("flag", "--" + name.replace("_", "-"))
            text = f"{about['help']}  [default: {_default_text(about)}]"
            kinds = {"sides": Sides, "several": Several}
            how: dict[str, Any] = {"cls": kinds[kind.many]} if kind.many in kinds else {"nargs": kind.many}
            command = click.option(flag, type=kind.type, default=None, help=text, **how)(command)
    return command


def _default_text(about: Mapping[str, Any]) -> str:
    default = about["default"]
    if isinstance(default, bool):
        return "on" if default else "off"
    own = f"{default:g}" if isinstance(default, int | float) else default
    return about.get("default_text") or about.get("default_from") or own


def _check_whole(kind: click.ParamType, value: Any) -> None:
    """Raise a ValueError for fractions and switches where whole numbers are asked: click would round them."""
    values = value if isinstance(value, list) else [value]
    if isinstance(kind, click.types.IntParamType) and any(isinstance(one, float | bool) for one in values):
        raise ValueError("give a whole number")


def read_recipe(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Callback of --config: the entries of a recipe become the defaults of the options."""
    if value is None:
        return
    recipes = config_dir() / "recipes"
    file = next((f for f in (Path(value), recipes / value, recipes / f"{value}.yml") if f.is_file()), None)
    if file is None:
        names = ", ".join(sorted(f.stem for f in recipes.glob("*.yml")))
        raise click.BadParameter(f"no file {value}; recipes in configs/recipes: {names}", ctx, param)
    try:
        recipe = read_yaml(file)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    known = {option.name: option for option in ctx.command.get_params(ctx)}
    if not isinstance(recipe, dict) or not recipe.keys() <= known.keys():
        unknown = ", ".join(map(str, recipe.keys() - known.keys())) if isinstance(recipe, dict) else "no mapping"
        raise click.BadParameter(f"{file}: {one_line(unknown)}; its keys are the options of this command", ctx, param)
    for name, value in recipe.items():
        try:
            _check_whole(known[name].type, value)
            known[name].type_cast_value(ctx, value)
        except Exception as error:  # click's types expect texts, and fail on other values with errors of all kinds
            raise click.BadParameter(f"{file}: {name} is {brief(value)}: {one_line(error)}", ctx, param) from error
    ctx.default_map = recipe


def print_once(text: str) -> None:
    """Print a line, once for all processes."""
    if parallel.is_main():
        click.echo(text)


def markdown(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows of measurements as a Markdown table.

    Args:
        columns: title -> format string of the entries of a row, such as "{tokens:.0f}".
        rows: one mapping per row.
    """
    cells = ([text.format(**row).replace("|", r"\|") for text in columns.values()] for row in rows)
    lines = [[*columns], ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show_scores(scores: Mapping[str, Any]) -> None:
    """Print the scores of all classes together, percent, and over how many classes the mean is one."""
    n_classes, n_scored = len(scores["per_class_iou"]), scores["n_scored"]
    fewer = f" (over {n_scored} of {n_classes} classes: the others are not in these images)" * (n_scored < n_classes)
    for key in ("pixel_accuracy", "mean_accuracy", "mean_iou"):
        click.echo(f"{key}: {scores[key]:.2f}" + fewer * (key == "mean_iou"))


def default_device() -> str:
    """CUDA if available, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def checkpoint_argument(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the argument CHECKPOINT, and --checkpoint, which chooses one of a run directory."""

    @wraps(command)
    def chosen(*args: Any, checkpoint: Path, which: str | None = None, **kwargs: Any) -> Any:
        return command(*args, checkpoint=checkpoint if which is None else find(checkpoint, which), **kwargs)

    return click.argument("checkpoint", type=click.Path(path_type=Path))(
        click.option(
            "--checkpoint",
            "which",
            type=click.Choice([*CHOICES]),
            help="Last, or best by mIoU.  [default: last]",
        )(chosen)
    )


dataset_argument = click.argument("dataset_name", metavar="DATASET", type=click.Choice(DATASETS))
images_argument = click.argument("images", metavar="DATASET|FOLDER", type=Images())
im_size_option = click.option(
    "--im-size",
    type=POSITIVE,
    metavar="PIXELS",
    help="Shorter side.  [default: the run's]",
)
scale_option = click.option(
    "--scale",
    type=click.Choice(SCALES),
    default=SCALES[0],
    help="Size of the images.",
)
window_option = click.option(
    "--window-size", cls=Sides, metavar="SIDE(S)", help="Window, pixels.  [default: the run's]"
)
amp_option = click.option("--amp/--no-amp", default=None, help="Mixed precision.  [default: as in training]")
runtime_option = click.option(
    "--runtime",
    type=click.Choice(("onnxruntime", "openvino")),
    metavar="NAME",
    help="For .onnx; or openvino.  [default: onnxruntime]",
)
device_option = click.option(
    "--device",
    type=Device(),
    default=default_device,
    show_default=False,
    help="Where to compute.  [default: cuda, else cpu]",
)
max_images_option = click.option("--max-images", type=POSITIVE, metavar="N", help="Images, at most.  [default: all]")
workers_option = click.option(
    "--num-workers",
    "workers",
    type=COUNT,
    metavar="N",
    default=parallel.default_workers,
    show_default=False,
    help=f"Processes that read images.  [default: cores, at most {parallel.MOST_WORKERS}]",
)
batch_size_option = click.option(
    "--batch-size", type=POSITIVE, metavar="N", default=1, help="Number of images per forward pass."
)
