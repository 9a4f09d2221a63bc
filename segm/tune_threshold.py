"""Find the lowest threshold that costs no mIoU (ALGM* in the paper)."""

import json
from pathlib import Path

import click
import torch
from tqdm import tqdm

import patch
from segm.checkpoint import checkpoint_file
from segm.data import DATASETS
from segm.eval.cost import images_per_second
from segm.eval.evaluate import evaluate
from segm.eval.runs import open_evaluation, run_normalization, square_view
from segm.metrics import segmentation_scores
from segm.model.factory import load_model
from segm.options import (
    PURE,
    Command,
    apply_patch,
    device_option,
    max_images_option,
    merging_settings,
    patch_options,
)
from segm.pictures import write_picture
from vis import threshold_curves

SPEED_IMAGES = 10


@click.command(cls=Command)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("dataset_name", metavar="DATASET", type=click.Choice(DATASETS))
@click.option("--highest", type=float, default=1.0, show_default=True, help="First threshold.")
@click.option("--lowest", type=float, default=0.7, show_default=True, help="Last threshold.")
@click.option(
    "--step", type=click.FloatRange(min=0, min_open=True), default=0.02, show_default=True, help="Between two."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of results.json and curves.png; what it holds is not measured again.  [default: beside CHECKPOINT]",
)
@device_option
@max_images_option
@patch_options
def main(checkpoint, dataset_name, highest, lowest, step, out, device, max_images, **given):
    """Score CHECKPOINT on DATASET at falling thresholds, and name the lowest that keeps the mIoU of the plain model.

    Prints a table of mIoU (percent), tokens per image and images/s (one image at crop x crop pixels). The threshold
    found is the last one down to which no threshold scored below the unpatched model.
    """
    if not -1 <= lowest <= highest <= 1:
        raise click.UsageError(f"--lowest {lowest}, --highest {highest}: give -1 <= lowest <= highest <= 1")
    model, variant = load_model(checkpoint)
    method, options = merging_settings(given, variant.get("dataset_kwargs"))
    if method == PURE or "threshold" not in patch.METHODS[method].defaults:
        raise click.UsageError("name a method with a threshold: --patch-type graph or algm")
    apply_patch(model, method, options | {"threshold": highest})  # refuses what is wrong before data are read
    patch.remove(model)
    dataset, windows = open_evaluation(variant, dataset_name)
    model.to(device)
    size = variant["dataset_kwargs"]["crop_size"]
    views = [
        square_view(dataset[index].image, size, run_normalization(variant)).to(device)
        for index in range(min(SPEED_IMAGES, len(dataset)))
    ]

    def measure(threshold):
        return _measure(model, method, options, threshold, dataset, windows, views, device, max_images)

    folder = out or checkpoint_file(checkpoint).parent / f"tune_threshold_{method}"
    settings = {"method": method, "dataset": dataset_name, "max_images": max_images, **_readable(options)}
    count = round((highest - lowest) / step) + 1
    thresholds = [None, *(round(highest - step * index, 6) for index in range(count))]
    rows = _measure_all(folder, settings, thresholds, measure)
    _report(rows, folder)


def _measure_all(folder, settings, thresholds, measure):
    """Measure every threshold that results.json does not hold yet; None stands for the unpatched model."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    rows = []
    if file.exists():
        saved = json.loads(file.read_text())
        if saved["settings"] != settings:
            raise click.UsageError(f"{file} was measured with other settings: choose another --out")
        rows = saved["rows"]
    known = {row["threshold"] for row in rows}
    for threshold in tqdm([t for t in thresholds if t not in known], desc="thresholds", leave=False):
        rows.append(measure(threshold))
        partial = file.with_suffix(".part")
        partial.write_text(json.dumps({"settings": settings, "rows": rows}, indent=2))
        partial.replace(file)
    wanted = {row["threshold"]: row for row in rows}
    return [wanted[threshold] for threshold in thresholds]


def _measure(model, method, options, threshold, dataset, windows, views, device, max_images):
    """mIoU, mean tokens per view and speed at one threshold."""
    if threshold is not None:
        apply_patch(model, method, options | {"threshold": threshold})
    try:
        confusion = evaluate(model, dataset, windows, device=device, n_images=max_images)
        tokens = sum(_tokens(model, view) for view in views) / len(views)
        rate = images_per_second({"predict": model.predict}, views, device)["predict"]
    finally:
        patch.remove(model)
    mean_iou = segmentation_scores(confusion)["mean_iou"]
    return {"threshold": threshold, "mean_iou": mean_iou, "tokens": tokens, "images_per_second": rate}


@torch.inference_mode()
def _tokens(model, view):
    """Patch tokens that an image (1, 3, H, W) keeps."""
    scores = model.grid_scores(view)
    return patch.reduction(model).counts.item() if patch.is_patched(model) else scores.shape[-2] * scores.shape[-1]


def _readable(options):
    """Options as JSON gives them back, the threshold left out."""
    kept = {name: value for name, value in options.items() if name != "threshold"}
    return json.loads(json.dumps(kept))


def _report(rows, folder):
    click.echo(f"{'threshold':>9} {'mIoU':>6} {'tokens':>8} {'images/s':>9}")
    for row in rows:
        name = "pure" if row["threshold"] is None else f"{row['threshold']:.3f}"
        click.echo(f"{name:>9} {row['mean_iou']:6.2f} {row['tokens']:8.1f} {row['images_per_second']:9.1f}")
    best = lowest_without_loss(rows)
    write_picture(folder / "curves.png", threshold_curves(rows[0], rows[1:], best))
    if best is None:
        click.echo("no threshold keeps the mIoU of the unpatched model")
    else:
        click.echo(f"lowest threshold without loss: {best}")
    click.echo(f"written to {folder}")


def lowest_without_loss(rows):
    """Lowest threshold down to which no threshold scored below the unpatched model; None if the first does.

    Args:
        rows: the unpatched model first, then falling thresholds.
    """
    pure, best = rows[0]["mean_iou"], None
    for row in rows[1:]:
        if row["mean_iou"] < pure:
            break
        best = row["threshold"]
    return best


if __name__ == "__main__":
    main()
