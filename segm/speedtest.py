"""Speed of a trained Segmenter, with several merging methods in one run."""

import copy
import json
import shlex
from pathlib import Path

import click
import torch
from tqdm import tqdm

import patch
from segm.eval.environment import environment
from segm.eval.runs import SquareViews, open_evaluation
from segm.eval.timing import interleaved_rates
from segm.model.factory import load_model
from segm.options import (
    PURE,
    Command,
    apply_patch,
    batch_size_option,
    checkpoint_argument,
    dataset_argument,
    device_option,
    max_images_option,
    merging_settings,
    patch_options,
    read_given_options,
    read_merging_options,
)
from segm.token_stats import count_tokens

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OUTPUTS = {
    "logits": lambda model: model,
    "scores": lambda model: model.grid_scores,
    "labels": lambda model: model.predict,
}
COMPILING_PASSES = 3  # of every shape: compile, record a CUDA graph, replay it


@click.command(cls=Command)
@checkpoint_argument
@dataset_argument
@batch_size_option
@click.option("--duplicate", is_flag=True, help="Fill a batch with copies of one image, which keeps its token count.")
@click.option("--dtype", type=click.Choice(DTYPES), default="float32", show_default=True, help="Of model and images.")
@click.option(
    "--output",
    type=click.Choice(OUTPUTS),
    default="logits",
    show_default=True,
    help="What is timed: logits per pixel (the published protocol), scores per patch, or the label map.",
)
@click.option("--warmup", type=click.IntRange(min=0), default=50, show_default=True, help="Untimed passes at first.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Timed passes per batch.")
@click.option(
    "--compare",
    help='Methods to time side by side, e.g. pure,graph or "pure,graph --threshold 0.9,algm --threshold 0.9".',
)
@click.option("--compile", "compiled", is_flag=True, help="Compile every method, before anything is timed.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON with rows, device and versions.")
@device_option
@max_images_option
@patch_options
def main(
    checkpoint,
    dataset_name,
    batch_size,
    duplicate,
    dtype,
    output,
    warmup,
    repeats,
    compare,
    compiled,
    out,
    device,
    **given,
):
    """Print images/s of CHECKPOINT on DATASET, at crop x crop pixels.

    Every validation image is timed --repeats times, its median counts; printed are median and quartiles over the
    images, without the reading of files. With --compare the methods take turns, image by image, and the ratio to
    the first one is the median over the images. Published protocols: G2TM --batch-size 1; ALGM --batch-size 32
    --duplicate.
    """
    max_images = given.pop("max_images")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)  # before hours of measuring
    model, variant = load_model(checkpoint)
    methods = read_methods(compare, given, variant)
    models = {name: apply_patch(copy.deepcopy(model), *chosen) for name, chosen in methods.items()}
    dataset, _ = open_evaluation(variant, dataset_name)
    precision = DTYPES[dtype]
    views = SquareViews(
        dataset, variant, max_images, batch_size=batch_size, duplicate=duplicate, device=device, dtype=precision
    )
    models = {name: patched.to(device=device, dtype=precision) for name, patched in models.items()}
    calls = {name: OUTPUTS[output](patched) for name, patched in models.items()}
    if compiled:
        for patched in models.values():
            patch.compile(patched)
        meet_every_shape(calls, views)
    rates = interleaved_rates(calls, views, device, repeats=repeats, warmup=warmup, progress=True)
    tokens = {name: mean_tokens(patched, views) for name, patched in models.items()}
    rows = [speed_row(name, rates[name], rates[next(iter(rates))], tokens[name]) for name in models]
    conditions = environment(device) | {"dtype": dtype, "batch_size": views.batch_size, "duplicate": duplicate}
    conditions |= {"compiled": compiled}
    conditions |= {"output": output, "side": views.side, "batches": len(views), "repeats": repeats, "warmup": warmup}
    click.echo(describe(conditions))
    click.echo(format_rows(rows))
    if out is not None:
        out.write_text(json.dumps(conditions | {"dataset": dataset_name, "rows": rows}, indent=2))


def read_methods(compare, given, variant):
    """Methods to time.

    Args:
        compare: value of --compare, or None.
        given: values of `patch_options`; with --compare they hold for every method that takes them.
        variant: content of `variant.yml`.

    Returns:
        What is written of a method -> (method, options) for `apply_patch`.

    Raises:
        ValueError: a method or option that is not allowed, or the same one twice.
    """
    saved = variant.get("dataset_kwargs")
    if compare is None:
        method, options = merging_settings(given, saved)
        return {method: (method, options)}
    if given.get("patch_type") is not None:
        raise ValueError("--compare and --patch-type: name all methods in --compare")
    common, methods = read_given_options(given), {}
    for text in (part.strip() for part in compare.split(",")):
        if text in methods:
            raise ValueError(f"--compare {compare}: {text} stands there twice")
        method, options = _read_method(text, saved)
        methods[text] = method, {key: common[key] for key in common if key in _known(method)} | options
    unused = [key for key in common if not any(key in _known(method) for method, _ in methods.values())]
    if unused:
        raise ValueError(f"{', '.join(unused)}: none of the methods in --compare {compare} takes it")
    return methods


def _read_method(text, saved):
    """`NAME [merging options]` -> (method, options); errors name --compare."""
    try:
        name, *own = shlex.split(text) or [""]
        return merging_settings(read_merging_options(["--patch-type", name, *own]), saved)
    except (click.UsageError, ValueError) as error:
        message = error.format_message() if isinstance(error, click.UsageError) else error
        raise ValueError(f"--compare {text!r}: {message}") from error


def _known(method):
    """Options that a method takes."""
    return () if method == PURE else patch.METHODS[method].defaults


@torch.inference_mode()
def meet_every_shape(calls, batches):
    """Let compiled models see every number of tokens before they are timed.

    Args:
        calls: name -> function of a batch (B, 3, H, W).
        batches: those that will be timed.
    """
    for batch in tqdm(batches, desc="compiling", unit="batch", leave=False):
        for call in calls.values():
            for _ in range(COMPILING_PASSES):
                call(batch)


def mean_tokens(model, views):
    """Patch tokens that an image keeps, on average."""
    return torch.cat([count_tokens(model, batch) for batch in views]).double().mean().item()


def speed_row(name, rates, reference, tokens):
    """Median and quartiles of images/s over the batches, and the median ratio to a reference; both (batches,)."""
    low, median, high = (rates.quantile(q).item() for q in (0.25, 0.5, 0.75))
    ratio = (rates / reference).quantile(0.5).item()
    return {"method": name, "images_per_second": median, "q25": low, "q75": high, "ratio": ratio, "tokens": tokens}


def describe(conditions):
    """One line that says what was measured with."""
    c = conditions
    images = f"{c['batches']} x {c['batch_size']} images of {c['side']} x {c['side']}"
    compiled = ", compiled" if c["compiled"] else ""
    return f"{c['device']}, {c['dtype']}, torch {c['torch']}; {images}, {c['output']}{compiled}"


def format_rows(rows):
    """The rows as Markdown."""
    lines = ["| method | tokens | images/s | quartiles | median ratio |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        quartiles = f"{row['q25']:.2f} to {row['q75']:.2f}"
        cells = f"{row['tokens']:.1f} | {row['images_per_second']:.2f} | {quartiles} | {row['ratio']:.3f}"
        lines.append(f"| {row['method']} | {cells} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
