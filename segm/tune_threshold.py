"""Find the lowest threshold that costs no mIoU (ALGM* in the paper), and the best setting at a speed."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import torch

import patch
from segm.checkpoint import checkpoint_file
from segm.cli import ABOVE_ZERO, FOLDER, POSITIVE, Numbers, checkpoint_argument, dataset_argument, device_option
from segm.eval.timing import device_name
from segm.merging import PURE, MergingCommand
from segm.run import Run
from segm.storage import write_picture
from segm.tradeoff import Row, Setting, Tradeoff, best_at
from vis import hull, threshold_curves, tradeoff_plot

COST = 10  # images for tokens and speed


@click.command(cls=MergingCommand)
@checkpoint_argument
@dataset_argument
@click.option("--highest", type=float, default=1.0, help="First threshold, a cosine similarity.")
@click.option("--lowest", type=float, default=0.7, help="Last threshold, a cosine similarity.")
@click.option("--step", type=ABOVE_ZERO, default=0.02, help="Distance of two thresholds.")
@click.option(
    "--im-size",
    "sizes",
    cls=Numbers,
    type=POSITIVE,
    help="Shorter sides of the images, pixels; every threshold is tried at each.  [default: the run's]",
)
@click.option(
    "--images-per-second",
    "speed",
    type=ABOVE_ZERO,
    help="Speed, images/s, at which the best size and threshold are also named.  [default: none]",
)
@click.option(
    "--out",
    type=FOLDER,
    help="Folder for results.json and curves.png; its results are not measured again.  [default: next to CHECKPOINT]",
)
@device_option
@click.option(
    "--max-images",
    type=POSITIVE,
    metavar="N",
    help=f"Number of images for the mIoU, spread over the data set; tokens and speed come from {COST}.  [default: all]",
)
def main(
    checkpoint: Path,
    dataset_name: str,
    highest: float,
    lowest: float,
    step: float,
    sizes: tuple[int, ...],
    speed: float | None,
    out: Path | None,
    device: torch.device,
    max_images: int | None,
    merging: dict[str, Any],
) -> None:
    """Score CHECKPOINT on DATASET at falling thresholds, and name the lowest that keeps the mIoU of the plain model.

    Prints a table of mIoU (percent) and, at the crop size and interleaved, tokens per image and images/s. The threshold
    found is the last one down to which no threshold scored below the unpatched model. With several --im-size, the
    settings on the hull are marked: no mixture of two others beats them in mIoU and speed.
    """
    thresholds = falling(highest, lowest, step)
    if merging.get("threshold") is not None:
        raise click.UsageError("--threshold: the thresholds to try go from --highest to --lowest")
    run = Run.load(checkpoint, device=device, patch_type=PURE)
    method, options = run.resolve_merging(merging)
    if method == PURE or not patch.find(method).takes("threshold"):
        names = ", ".join(name for name, entry in patch.METHODS.items() if entry.takes("threshold"))
        raise click.UsageError(f"name a method with a threshold: --patch-type {{{names}}}")
    file = checkpoint_file(checkpoint)
    folder = out or file.parent / f"tune_threshold_{method}"
    conditions: dict[str, Any] = {"method": method, "dataset": dataset_name, "max_images": max_images}
    conditions |= {name: value for name, value in options.items() if name != "threshold"}
    conditions |= {"checkpoint": file.name, "changed": file.stat().st_mtime, "device": device_name(device)}
    tradeoff = Tradeoff(run, dataset_name, folder / "results.json", conditions, COST, max_images)
    tried = [
        Setting(im_size=size) if threshold is None else Setting(method, options | {"threshold": threshold}, size)
        for size in sizes or (None,)
        for threshold in (None, *thresholds)
    ]
    rows = tradeoff.measure(tried)
    report(rows, folder, len(thresholds) + 1)
    if speed is not None:
        click.echo(recommendation(rows, speed))
    click.echo(f"written to {folder}")


def falling(highest: float, lowest: float, step: float) -> list[float]:
    """Thresholds from `highest` down to `lowest`, which is always the last one.

    Raises:
        ValueError: not -1 <= lowest <= highest <= 1.
    """
    if not -1 <= lowest <= highest <= 1:
        raise ValueError(f"--lowest {lowest}, --highest {highest}: give -1 <= lowest <= highest <= 1")
    count = math.floor((highest - lowest) / step + 1e-6) + 1
    thresholds = [round(highest - step * index, 6) for index in range(count)]
    return thresholds if thresholds[-1] <= lowest + 1e-6 else [*thresholds, lowest]


def report(rows: Sequence[Row], folder: Path, per_size: int) -> None:
    """Print the rows and draw them; so many of them belong to one image size, the unpatched one first."""
    several = len(rows) > per_size
    times, scores = [1 / row["images_per_second"] for row in rows], [row["mean_iou"] for row in rows]
    best = set(hull(times, scores)) if several else set()
    click.echo(f"{'im_size ' * several}{'threshold':>9} {'mIoU':>6} {'tokens':>8} {'images/s':>9}")
    for index, row in enumerate(rows):
        size = f"{row['im_size']:>7} " if several else ""
        mark = "  on the hull" if index in best else ""
        numbers = f"{row['mean_iou']:6.2f} {row['tokens']:8.1f} {row['images_per_second']:9.1f}"
        threshold = PURE if row["method"] == PURE else f"{row['options']['threshold']:.3f}"
        click.echo(f"{size}{threshold:>9} {numbers}{mark}")
    for first in range(0, len(rows), per_size):
        own = rows[first : first + per_size]
        at = f" at {own[0]['im_size']} pixels" if several else ""
        lowest, none = lowest_without_loss(own), f"no threshold keeps the mIoU of the unpatched model{at}"
        click.echo(none if lowest is None else f"lowest threshold without loss{at}: {lowest}")
    if several:
        labels = [(PURE if row["method"] == PURE else f"{row['method']}, {row['im_size']} pixels") for row in rows]
        picture = tradeoff_plot(rows, labels)
    else:
        curve = [row | {"threshold": row["options"]["threshold"]} for row in rows[1:]]
        picture = threshold_curves(rows[0], curve, lowest_without_loss(rows))
    write_picture(folder / "curves.png", picture)


def lowest_without_loss(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Lowest threshold down to which no threshold scored below the unpatched model; None if the first does.

    Args:
        rows: the unpatched model first, then falling thresholds.
    """
    pure, best = rows[0]["mean_iou"], None
    for row in rows[1:]:
        if row["mean_iou"] < pure:
            break
        best = row["options"]["threshold"]
    return best


def recommendation(rows: Sequence[Row], speed: float) -> str:
    """In a line, the options with the highest mIoU of those that are fast enough."""
    best = best_at(rows, speed)
    if best is None:
        fastest = max(row["images_per_second"] for row in rows)
        return f"nothing reaches {speed:g} images/s, the fastest {fastest:.1f}: try smaller images (--im-size)"
    words = [] if best["im_size"] is None else [f"--im-size {best['im_size']}"]
    words.append(f"--patch-type {best['method']}")
    if best["method"] != PURE:
        words.append(f"--threshold {best['options']['threshold']:g}")
    score = f"mIoU {best['mean_iou']:.2f}, {best['images_per_second']:.1f} images/s"
    return f"at least {speed:g} images/s: {' '.join(words)} ({score})"


if __name__ == "__main__":
    main()
