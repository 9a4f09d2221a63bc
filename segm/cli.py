"""Click plumbing that the commands share: one-line errors, open-ended lists of values, and common options."""

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch

from segm import parallel
from segm.data import DATASETS
from segm.errors import one_line
from segm.sizes import short

LONGEST = 2000  # characters of an error: lists of classes have their place
POSITIVE = click.IntRange(min=1)
RATE = click.FloatRange(min=0)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Numbers(click.Option):
    """An option that takes all numbers that follow it: `--selected-layers 1 5`; and some words, if there are any."""

    def __init__(self, *args: Any, words: Collection[str] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"multiple": True})
        self.words = words

    def takes(self, text: str) -> bool:
        """Whether a word of the command line is one of its values."""
        return text in self.words or _is_number(text)


class Sides(Numbers):
    """A size in pixels: one number, or height and width; (height, width) unless it is a square."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"type": POSITIVE, "metavar": "SIDE|HEIGHT WIDTH"})

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        sides = super().type_cast_value(ctx, [value] if isinstance(value, int | str) else value)
        if len(sides) > 2:
            raise click.BadParameter(f"{len(sides)} numbers: give one, or height and width", ctx, self)
        return short(sides[0] if len(sides) == 1 else sides) if sides else None


class Command(click.Command):
    """A command whose wrong input ends in one line and a status other than 0."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        several = {
            name: option for option in self.get_params(ctx) if isinstance(option, Numbers) for name in option.opts
        }
        return super().parse_args(ctx, repeat_option(args, {name: option.takes for name, option in several.items()}))

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        with _one_line_errors():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        # Pillow warns of large pictures; those above twice its limit are refused.
        warnings.filterwarnings("ignore", message="Image size")
        with _one_line_errors():
            return super().invoke(ctx)


class WrongUsage(click.ClickException):
    """A command line that is not understood; click's own error prints the usage in front of it."""

    exit_code = 2


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """Errors of files, values and usage end in one line of bounded length, without the usage that click prints."""
    try:
        yield
    except (click.ClickException, ValueError, OSError) as error:
        click_error = isinstance(error, click.ClickException)
        message = one_line(error.format_message(), LONGEST) if click_error else _message(error)
        if parallel.hand_over(f"Error: {message}"):
            raise SystemExit(1) from error
        kind = WrongUsage if isinstance(error, click.UsageError) else click.ClickException
        raise kind(message) from error
    except RuntimeError as error:
        if parallel.has_lost_another(error) and parallel.hand_over("Error: another process ended", follows=True):
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
    current, waiting = None, False
    for arg in [*_split_equals(args, names), None]:
        if current and arg is not None and names[current](arg):
            repeated += [current, arg]
            waiting = False
            continue
        if waiting and current:
            repeated.append(current)  # without a value: click says what is missing
        current = arg if arg in names else None
        waiting = current is not None
        if arg is not None and not waiting:
            repeated.append(arg)
    return repeated


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


class Device(click.ParamType):
    """A torch device that is there."""

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


def show_scores(scores: Mapping[str, Any]) -> None:
    """Print the scores of all classes together, percent, and over how many classes the mean is one."""
    n_classes, n_scored = len(scores["per_class_iou"]), scores["n_scored"]
    fewer = (
        f" (over {n_scored} of {n_classes} classes: the others are not in these images)" if n_scored < n_classes else ""
    )
    for key in ("pixel_accuracy", "mean_accuracy", "mean_iou"):
        click.echo(f"{key}: {scores[key]:.2f}" + (fewer if key == "mean_iou" else ""))


def default_device() -> str:
    """CUDA where it is there, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


checkpoint_argument = click.argument("checkpoint", type=click.Path(path_type=Path))
dataset_argument = click.argument("dataset_name", metavar="DATASET", type=click.Choice(DATASETS))
images_argument = click.argument("images", metavar="DATASET|FOLDER", type=Images())
im_size_option = click.option(
    "--im-size", type=POSITIVE, help="Shorter side of the images, pixels; windows scale with it.  [default: the run's]"
)
amp_option = click.option("--amp/--no-amp", default=None, help="Mixed precision.  [default: as in training]")
device_option = click.option(
    "--device", type=Device(), default=default_device, show_default="cuda if there, else cpu", help="Where to compute."
)
max_images_option = click.option(
    "--max-images", type=POSITIVE, help="Use so many images, spread over the data set.  [default: all]"
)
workers_option = click.option(
    "--num-workers",
    "workers",
    type=click.IntRange(min=0),
    default=parallel.default_workers,
    show_default=f"the cores of the machine, at most {parallel.MOST_WORKERS}",
    help="Processes that read and resize images; 0: none but the program itself.",
)
batch_size_option = click.option(
    "--batch-size", type=POSITIVE, default=1, show_default=True, help="Images per forward pass."
)
