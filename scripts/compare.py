"""Compare merging methods on one data set: tokens, GFLOPs, images/s and mIoU, all measured in one run."""

import json
import platform
import shlex
from pathlib import Path

import click
import torch
from tqdm import tqdm

import patch
from segm.data import DATASETS
from segm.eval.cost import count_gflops, images_per_second
from segm.eval.evaluate import evaluate
from segm.eval.runs import open_evaluation, run_normalization, square_view
from segm.metrics import segmentation_scores
from segm.options import Command, default_device, load_patched, patch_options


def measure(models, views, device):
    """Cost of several models on the same images.

    Args:
        models: name -> Segmenter, patched or not.
        views: list of images (1, 3, H, W).

    Returns:
        One dict per model: `method`, `tokens` (mean of what is left of the patch tokens), `gflops` (mean, one per
        multiply-add), `images_per_second` of `predict` (median, interleaved).
    """
    rates = images_per_second({name: model.predict for name, model in models.items()}, views, device)
    rows = []
    for name, model in models.items():
        tokens, gflops = zip(*(tokens_and_gflops(model, view) for view in views), strict=True)
        mean = {"tokens": sum(tokens) / len(tokens), "gflops": sum(gflops) / len(gflops)}
        rows.append({"method": name, **mean, "images_per_second": rates[name]})
    return rows


def tokens_and_gflops(model, image):
    """Patch tokens that are left at the end of the encoder, and operations, of one image (1, 3, H, W)."""
    gflops = count_gflops(model, image)
    if patch.is_patched(model):
        return patch.reduction(model).counts.item(), gflops
    rows, columns = (-(-side // size) for side, size in zip(image.shape[-2:], model.patch_size, strict=True))
    return rows * columns, gflops


def format_table(rows):
    """The rows as Markdown."""
    lines = ["| method | tokens | GFLOPs | images/s | mIoU |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = f"{row['tokens']:.1f} | {row['gflops']:.3f} | {row['images_per_second']:.1f} | {row['mean_iou']:.2f}"
        lines.append(f"| {row['method']} | {cells} |")
    return "\n".join(lines)


@click.command(cls=Command)
@patch_options
def merging_options(**given):
    """The merging options of one method."""
    return given


def read_method(text):
    """`NAME=RUN [merging options]` -> (NAME, RUN, values of the merging options)."""
    name, equals, rest = text.partition("=")
    if not equals or not rest:
        raise click.UsageError(f"{text!r}: give NAME=RUN, and merging options behind it")
    run, *options = shlex.split(rest)
    return name, Path(run), merging_options.main(options, standalone_mode=False)


@click.command(cls=Command)
@click.argument("dataset_name", metavar="DATASET", type=click.Choice(DATASETS))
@click.argument("methods", nargs=-1, required=True)
@click.option("--cost-images", default=20, show_default=True, help="Images for tokens, GFLOPs and images/s.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON with the rows, device and versions.")
def main(dataset_name, methods, cost_images, out):
    """Measure METHODS on DATASET, each "NAME=RUN" or "NAME=RUN --patch-type algm --threshold 0.9 ...".

    Images are resized to crop x crop for the cost, and go through the sliding window at full size for the mIoU.
    """
    device = torch.device(default_device())
    loaded = {name: load_patched(run, given, device) for name, run, given in map(read_method, methods)}
    variant = next(iter(loaded.values()))[1]
    dataset, windows = open_evaluation(variant, dataset_name)
    side = variant["dataset_kwargs"]["crop_size"]
    views = [
        square_view(dataset[index].image, side, run_normalization(variant)).to(device)
        for index in range(min(cost_images, len(dataset)))
    ]
    rows = measure({name: model for name, (model, _) in loaded.items()}, views, device)
    for row in tqdm(rows, desc="mIoU", leave=False):
        confusion = evaluate(loaded[row["method"]][0], dataset, windows, device=device, progress=True)
        row["mean_iou"] = segmentation_scores(confusion)["mean_iou"]
    click.echo(format_table(rows))
    if out is not None:
        versions = {"python": platform.python_version(), "torch": torch.__version__, "device": str(device)}
        versions |= {"threads": torch.get_num_threads(), "processor": platform.processor() or platform.machine()}
        out.write_text(json.dumps({"dataset": dataset_name, "methods": methods, **versions, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
