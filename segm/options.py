"""Options that the commands share, and how merging settings travel between options and `variant.yml`."""

from pathlib import Path

import click
import torch

import patch
from segm.data import DATASETS
from segm.model.factory import load_model

PURE = "pure"


class Numbers(click.Option):
    """An option that takes all numbers that follow it: `--selected-layers 1 5`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, multiple=True, **kwargs)


class Command(click.Command):
    """A command whose wrong input ends in one line and a status other than 0."""

    def parse_args(self, ctx, args):
        names = {name for option in self.params if isinstance(option, Numbers) for name in option.opts}
        return super().parse_args(ctx, repeat_option(args, names))

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (ValueError, OSError) as error:
            raise click.ClickException(_one_line(error)) from error


def _one_line(error):
    """The message; of an error in a data loader's worker, which carries its traceback, only the end."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if lines[0].startswith("Caught ") and "Traceback" in str(error):
        return lines[-1].partition(": ")[2] or lines[-1]
    return " ".join(" ".join(lines).split())


def repeat_option(args, names):
    """`--layers 1 5` -> `--layers 1 --layers 5` for the options in `names`: click has no open-ended options."""
    repeated, current, waiting = [], None, False
    for arg in [*_split_equals(args, names), None]:
        if current and arg is not None and _is_number(arg):
            repeated += [current, arg]
            waiting = False
            continue
        if waiting:
            repeated.append(current)  # without a number: click says what is missing
        current = arg if arg in names else None
        waiting = current is not None
        if arg is not None and not waiting:
            repeated.append(arg)
    return repeated


def _split_equals(args, names):
    """`--layers=1` -> `--layers 1` for the options in `names`."""
    for arg in args:
        name, equals, value = arg.partition("=")
        yield from (name, value) if equals and name in names else (arg,)


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


class MethodName(click.ParamType):
    """`pure` or a registered method; the registry is asked when the option is read."""

    name = "method"

    def convert(self, value, param, ctx):
        allowed = (PURE, *patch.METHODS)
        if value not in allowed:
            self.fail(f"{value!r}: choose one of {', '.join(allowed)}", param, ctx)
        return value

    def get_metavar(self, param, ctx=None):
        return "{" + ",".join((PURE, *patch.METHODS)) + "}"


class Device(click.ParamType):
    """A torch device that is there."""

    name = "device"

    def convert(self, value, param, ctx):
        try:
            device = torch.device(value)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            self.fail(f"{value!r} is not available here: {str(error).splitlines()[0]}", param, ctx)
        return device


AUTO = "auto"


class NumberOr(click.ParamType):
    """A number, or one of some words."""

    name = "number"

    def __init__(self, *words):
        self.words = words

    def convert(self, value, param, ctx):
        if value in self.words:
            return value
        try:
            return float(value)
        except ValueError:
            self.fail(f"{value!r}: give a number or {' or '.join(self.words)}", param, ctx)

    def get_metavar(self, param, ctx=None):
        return "|".join(("FLOAT", *self.words))


def default_device():
    """CUDA where it is there, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _stack(*options):
    """Several decorators as one, in the order in which --help shall list them."""

    def decorate(command):
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


checkpoint_argument = click.argument("checkpoint", type=click.Path(path_type=Path))
dataset_argument = click.argument("dataset_name", metavar="DATASET", type=click.Choice(DATASETS))
device_option = click.option(
    "--device",
    type=Device(),
    default=default_device,
    show_default="cuda if there, else cpu",
    help="Where to compute.",
)
max_images_option = click.option(
    "--max-images", type=click.IntRange(min=1), help="Stop after this many images.  [default: all]"
)
batch_size_option = click.option(
    "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Images per forward pass."
)
patch_options = _stack(
    click.option(
        "--patch-type",
        type=MethodName(),
        help="Merging method; pure: none. It and its options default to what the checkpoint was trained with.",
    ),
    click.option("--selected-layer", type=int, help="Layer in which to merge, counted from 1."),
    click.option(
        "--selected-layers", cls=Numbers, type=int, help="Layers in which to merge, counted from 1, as in 1 5."
    ),
    click.option(
        "--threshold",
        type=NumberOr(AUTO),
        help="Cosine similarity (-1 to 1) above which tokens may merge; auto (train.py --from): mean + std.",
    ),
    click.option(
        "--gbm-threshold", type=NumberOr("adaptive", "tau"), help="algm: that of GBM; tau: the same as --threshold."
    ),
    click.option("--merging-window-size", type=int, nargs=2, help="algm: patches per window; 0 0: GBM in every layer."),
    click.option(
        "--r", cls=Numbers, type=int, help="tome: tokens that a layer removes; or one number per layer, as in 16 8 8 0."
    ),
    click.option(
        "--r-inflection", type=float, help="tome: from fewer to more over the layers (1), or the other way (-1)."
    ),
    click.option(
        "--batch-mode",
        type=click.Choice(["ragged", "uniform"]),
        help="ragged: each image keeps its own number of tokens; uniform: all as many as the one that merges least.",
    ),
    click.option(
        "--prop-attn/--no-prop-attn",
        default=None,
        help="Add log(size) of merged tokens to the attention logits, or not.",
    ),
    click.option("--iprop-attn", is_flag=True, default=None, help="Subtract log(size) instead."),
)
PATCH_NAMES = (
    "patch_type",
    "selected_layer",
    "selected_layers",
    "threshold",
    "gbm_threshold",
    "merging_window_size",
    "r",
    "r_inflection",
    "batch_mode",
    "prop_attn",
    "iprop_attn",
)


@click.command(cls=Command, add_help_option=False)
@patch_options
def _merging_options(**given):
    return given


def read_merging_options(arguments):
    """Values of `patch_options` from a list of words, such as ["--patch-type", "graph", "--threshold", "0.9"].

    Raises:
        click.UsageError: unknown options or values.
    """
    return _merging_options.main(list(arguments), standalone_mode=False)


def merging_settings(given, saved=None):
    """The merging method and its options: what was given, then what a checkpoint was trained with.

    Args:
        given: values of `patch_options`, None where not given.
        saved: `dataset_kwargs` of a `variant.yml`, or None. Its settings count unless another method is given.

    Returns:
        (method, options) for `patch.segmenter`; method is "pure" for none. Options that nobody set are left out.

    Raises:
        ValueError: options that contradict each other.
    """
    saved = saved or {}
    saved_method = saved.get("patch_type") or PURE
    method = given.get("patch_type") or saved_method
    options = _read_variant_options(saved) if method == saved_method else {}
    options |= read_given_options(given)
    if method == PURE:
        unused = [name for name in PATCH_NAMES[1:] if given.get(name) not in (None, ())]
        if unused:
            flags = ", ".join("--" + name.replace("_", "-") for name in unused)
            raise ValueError(f"{flags}: nothing merges without --patch-type {{{','.join(patch.METHODS)}}}")
        return PURE, {}
    return method, options


def _read_variant_options(saved):
    layers = saved.get("selected_layers") or saved.get("selected_layer")
    options = {
        "layers": [layers] if isinstance(layers, int) else layers,
        "threshold": saved.get("threshold"),
        "gbm_threshold": saved.get("gbm_threshold"),
        "r": _schedule(saved.get("r"), saved.get("r_inflection")),
        "attention": saved.get("attention"),
        "batch": saved.get("batch_mode"),
    }
    if saved.get("patch_type") == "tome" and options["attention"] is None:
        options["attention"] = "none"  # a model that was trained with ToMe has learned to go without
    return _set_options(options) | _window(saved.get("merging_window_size"))


def read_given_options(given):
    """The options of a method as `patch` takes them, from the values of `patch_options`; raises ValueError."""
    if given.get("selected_layer") is not None and given.get("selected_layers"):
        raise ValueError("--selected-layer and --selected-layers: give one of them")
    if given.get("prop_attn") and given.get("iprop_attn"):
        raise ValueError("--prop-attn and --iprop-attn: choose one of them")
    if given.get("threshold") == AUTO:
        raise ValueError("--threshold auto: give it to train.py, with --from and an unpatched checkpoint")
    layer, r = given.get("selected_layer"), list(given.get("r") or ())
    options = {
        "layers": [layer] if layer is not None else list(given.get("selected_layers") or ()) or None,
        "threshold": given.get("threshold"),
        "gbm_threshold": given.get("gbm_threshold"),
        "r": _schedule(r[0] if len(r) == 1 else r or None, given.get("r_inflection")),
        "attention": _given_attention(given),
        "batch": given.get("batch_mode"),
    }
    return _set_options(options) | _window(given.get("merging_window_size"))


def _set_options(options):
    return {name: value for name, value in options.items() if value is not None}


def _window(size):
    """The window, if a size is known: 0 0 stands for none."""
    return {} if not size else {"window": tuple(size) if any(size) else None}


def _schedule(r, inflection):
    """r as `patch` takes it: a number, a list per layer, or a pair with the inflection."""
    if inflection is None:
        return r
    if not isinstance(r, int):
        raise ValueError(f"an inflection of r goes with one number for all layers: give one --r, not {r}")
    return (r, inflection)


def _given_attention(given):
    if given.get("iprop_attn"):
        return "inverse"
    return {True: "proportional", False: "none", None: None}[given.get("prop_attn")]


def variant_settings(method, settings):
    """The entries of `dataset_kwargs` that `merging_settings` reads again.

    Args:
        method: name, or "pure".
        settings: from `patch.settings`, empty for "pure".
    """
    entries = {"patch_type": method, "threshold": settings.get("threshold")}
    if method == PURE:
        return entries | {"selected_layer": None}
    layers = list(settings["layers"])
    entries |= {"selected_layer": layers[0]} if len(layers) == 1 else {"selected_layers": layers}
    if "window" in settings:
        entries["merging_window_size"] = list(settings["window"] or (0, 0))
    if "gbm_threshold" in settings:
        entries["gbm_threshold"] = settings["gbm_threshold"]
    if "r" in settings:
        pair = isinstance(settings["r"], tuple)
        entries |= {"r": settings["r"][0], "r_inflection": settings["r"][1]} if pair else {"r": settings["r"]}
    return entries | {"attention": settings["attention"], "batch_mode": settings["batch"]}


def merging_of(model):
    """What `variant_settings` says of a model, patched or not."""
    if not patch.is_patched(model):
        return variant_settings(PURE, {})
    return variant_settings(patch.method(model), patch.settings(model))


def apply_patch(model, method, options):
    """Patch a model with what `merging_settings` returned; "pure" leaves it as it is."""
    return model if method == PURE else patch.segmenter(model, method, **options)


def load_patched(checkpoint, given, device):
    """Load a trained model that merges as it did in training, unless options say otherwise.

    Args:
        checkpoint: file or run directory.
        given: values of `patch_options`.
        device: where to put the model.

    Returns:
        (model in evaluation mode, variant).
    """
    model, variant = load_model(checkpoint)
    apply_patch(model, *merging_settings(given, variant.get("dataset_kwargs")))
    return model.to(device), variant
