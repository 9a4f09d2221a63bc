"""Speed of a trained Segmenter, with several merging methods in one run."""

import copy
import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

import patch
from segm import cli
from segm.eval.timing import environment, interleaved_rates, warm_up_shapes
from segm.merging import PURE, MergingCommand, apply, compile_network, mean_tokens, parse
from segm.run import Run
from segm.storage import write_text

OUTPUTS = {
    "logits": lambda model: model,
    "scores": lambda model: model.grid_logits,
    "labels": lambda model: model.predict,
}
COLUMNS = {
    "method": "{method}",
    "tokens": "{tokens:.1f}",
    "images/s": "{images_per_second:.2f}",
    "quartiles": "{q25:.2f} to {q75:.2f}",
    "median ratio": "{ratio:.3f}",
}


@click.command(cls=MergingCommand)
@cli.checkpoint_argument
@cli.images_argument
@cli.batch_size_option
@click.option("--duplicate", is_flag=True, help="Fill a batch with copies of one image, which keeps its token count.")
@click.option("--dtype", type=click.Choice(cli.DTYPES), default="float32", help="Precision of model and images.")
@click.option(
    "--output",
    type=click.Choice(OUTPUTS),
    default="logits",
    help="Output that is timed: logits per pixel (the published protocol), logits per patch, or the label map.",
)
@click.option("--warmup", type=cli.COUNT, default=50, help="Number of untimed passes at first.")
@click.option("--repeats", type=cli.POSITIVE, default=3, help="Number of timed passes per batch.")
@click.option(
    "--compare",
    help='Methods to time, interleaved, as in "pure,graph --threshold 0.9".  [default: that of the run alone]',
)
@click.option("--compile", "compiled", is_flag=True, help="Compile every method, before anything is timed.")
@click.option("--out", type=cli.FILE, help="JSON file for rows, device and versions.  [default: none]")
@cli.im_size_option
@cli.device_option
@cli.max_images_option
def main(
    checkpoint: Path,
    images: str | Path,
    batch_size: int,
    duplicate: bool,
    dtype: str,
    output: str,
    warmup: int,
    repeats: int,
    compare: str | None,
    compiled: bool,
    out: Path | None,
    im_size: int | None,
    device: torch.device,
    max_images: int | None,
    merging: dict[str, Any],
) -> None:
    """Print images/s of CHECKPOINT on DATASET, at the crop size.

    Every validation image is timed --repeats times, and its median counts; reading files is not timed. Prints median
    and quartiles over the images. With --compare the methods are interleaved, image by image, and the ratio to the
    first one is the median over the images. Published protocols: G2TM --batch-size 1; ALGM --batch-size 32
    --duplicate.
    """
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)  # before hours of measuring
    how: dict[str, Any] = {"preset": merging.pop("preset", None), "im_size": im_size, "amp": False}
    run, precision = Run.load(checkpoint, device=device, patch_type=PURE, **how), cli.DTYPES[dtype]
    methods = read_methods(compare, merging, run.resolve_merging)
    model = run.model.to(precision)
    models = {name: apply(copy.deepcopy(model), *chosen) for name, chosen in methods.items()}
    views = run.views(images, max_images, batch_size=batch_size, duplicate=duplicate, dtype=precision)
    calls = {name: OUTPUTS[output](patched) for name, patched in models.items()}
    if compiled:
        for patched in models.values():
            setattr(patched, "network", compile_network(patched))  # noqa: B010 - a method to mypy
        warm_up_shapes(calls, views)
    rates = interleaved_rates(calls, views, device, repeats=repeats, warmup=warmup, progress=True)
    reference = next(iter(rates.values()))
    rows = [speed_row(name, rates[name], reference, mean_tokens(patched, views)) for name, patched in models.items()]
    conditions = environment(device) | {"dtype": dtype, "batch_size": views.batch_size, "duplicate": duplicate}
    height, width = views.size
    conditions |= {"compiled": compiled, "height": height, "width": width}
    conditions |= {"output": output, "batches": len(views), "repeats": repeats, "warmup": warmup}
    what = f"{len(views)} x {views.batch_size} images of {height} x {width}, {output}" + ", compiled" * compiled
    click.echo(f"{conditions['device']}, {dtype}, torch {conditions['torch']}; {what}")
    click.echo(cli.markdown(COLUMNS, rows))
    if out is not None:
        write_text(out, json.dumps(conditions | {"dataset": str(images), "rows": rows}, indent=2))


def read_methods(
    compare: str | None, merging: dict[str, Any], resolve: Callable[[dict[str, Any]], tuple[str, dict[str, Any]]]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """Methods to time.

    Args:
        compare: value of --compare, or None.
        merging: method and options that were given; with --compare, options hold for every method that takes them.
        resolve: from what is given to (method, options): `Run.resolve_merging`, whose variant gives the options that
            are not given, or `segm.merging.choose`.

    Returns:
        Text of a method -> (method, options) for `segm.merging.apply`.

    Raises:
        ValueError: a method or option that is not allowed, or the same one twice.
    """
    if compare is None:
        method, options = resolve(merging)
        return {method: (method, options)}
    if "patch_type" in merging:
        raise ValueError("--compare and --patch-type: name all methods in --compare")
    methods, used = {}, set()
    for text in (part.strip() for part in compare.split(",")):
        if text in methods:
            raise ValueError(f"--compare {compare}: {text} is listed twice")
        try:
            name, *own = shlex.split(text) or [""]
            given = parse(["--patch-type", name, *own])
            taken = set() if name == PURE else {key for key in merging if patch.find(name).takes(key)}
            methods[text] = resolve({key: merging[key] for key in taken} | given)
        except ValueError as error:
            raise ValueError(f"--compare {text!r}: {error}") from error
        used |= taken
    unused = [key for key in merging if key not in used]
    if unused:
        raise ValueError(f"{', '.join(unused)}: none of the methods in --compare {compare} takes it")
    return methods


def speed_row(name: str, rates: Tensor, reference: Tensor, tokens: float) -> dict[str, Any]:
    """Median and quartiles of images/s over the batches, and the median ratio to a reference; both (batches,)."""
    low, median, high = (rates.quantile(q).item() for q in (0.25, 0.5, 0.75))
    ratio = (rates / reference).quantile(0.5).item()
    return {"method": name, "images_per_second": median, "q25": low, "q75": high, "ratio": ratio, "tokens": tokens}


if __name__ == "__main__":
    main()
