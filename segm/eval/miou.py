"""Score a trained Segmenter on a data set, single-scale or multi-scale, and save its predictions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from torch import Tensor

from segm.checkpoint import checkpoint_file
from segm.cli import (
    Sides,
    amp_option,
    checkpoint_argument,
    dataset_argument,
    device_option,
    im_size_option,
    max_images_option,
    runtime_option,
    scale_option,
    show_scores,
    window_option,
    workers_option,
)
from segm.config import SCALES
from segm.data import Sample, SegmentationDataset
from segm.data.dataset import label_type
from segm.errors import one_line
from segm.eval.sliding import Windows
from segm.exported import open_run
from segm.merging import MergingCommand
from segm.parallel import is_main, process_group
from segm.run import Run
from segm.sizes import Size, scaled
from segm.storage import write_picture, write_text
from vis import blend, colorize, confusion_picture

PER_CLASS = ("per_class_iou", "per_class_boundary_iou")


@click.command(cls=MergingCommand)
@checkpoint_argument
@dataset_argument
@click.option(
    "--singlescale/--multiscale",
    default=True,
    show_default=True,
    help="Multi-scale sums the probabilities of 6 scales, 0.5 to 1.75, and of their mirror images.",
)
@click.option("--split", default="val", show_default=True, help="Split of the data set to score on.")
@window_option
@click.option("--window-stride", cls=Sides, help="Distance between windows, pixels.  [default: the run's]")
@click.option(
    "--window-batch-size",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Windows of an image per forward pass.",
)
@click.option(
    "--boundary", is_flag=True, help="Also measure the boundary IoU: that of pixels near the edges of a class."
)
@click.option("--confusion", is_flag=True, help="Also draw the confusion matrix, beside the scores.")
@click.option("--save-images", is_flag=True, help="Write label maps beside the checkpoint.")
@click.option(
    "--blend/--no-blend",
    "blended",
    default=True,
    show_default=True,
    help="With --save-images, also lay the label maps over the images.",
)
@click.option(
    "--frac-dataset",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Use this share of the images, 0 to 1, spread over the data set.",
)
@amp_option
@im_size_option
@scale_option
@runtime_option
@device_option
@max_images_option
@workers_option
def main(
    checkpoint: Path,
    dataset_name: str,
    singlescale: bool,
    split: str,
    window_size: Size | None,
    window_stride: Size | None,
    window_batch_size: int,
    boundary: bool,
    confusion: bool,
    save_images: bool,
    blended: bool,
    frac_dataset: float,
    amp: bool | None,
    im_size: int | None,
    scale: str,
    runtime: str | None,
    device: torch.device,
    max_images: int | None,
    workers: int,
    merging: dict[str, Any],
) -> None:
    """Score CHECKPOINT, a file, a run directory or an exported one, on DATASET.

    Prints pixel accuracy, mean accuracy, mIoU and the IoU of every class (percent) and writes them to scores_ss.yml or
    scores_ms.yml beside the checkpoint, a list with one entry per conditions: checkpoint, images, windows, precision
    and merging. Label maps (8-bit class indices) and blends go to images_ss or images_ms, the confusion matrix to
    confusion_ss.png. Of another split or data set, the names say which: scores_ss_test.yml.
    """
    with process_group(device) as device:
        how: dict[str, Any] = {"amp": amp, "im_size": im_size, "scale": scale, "runtime": runtime}
        run = open_run(checkpoint, device=device, merging=merging, **how)
        dataset, _ = run.open(split, dataset_name)
        suffix = "ss" if singlescale else "ms"
        if (dataset_name, split) != (run.dataset, "val"):  # files with other results stay as they are
            suffix += f"_{split}" if dataset_name == run.dataset else f"_{dataset_name}_{split}"
        file = run.folder / f"scores_{suffix}.yml"
        read_entries(file)  # a damaged one is named before the images are scored
        part = max(1, round(frac_dataset * len(dataset)))
        n_images = min(part, max_images or part)
        windows = run.choose_windows(window_size, window_stride, window_batch_size)
        scores = run.evaluate(
            dataset=dataset,
            windows=windows,
            multiscale=not singlescale,
            n_images=n_images,
            boundary=boundary,
            with_confusion=confusion,
            workers=workers,
            on_image=_image_writer(run.folder / f"images_{suffix}", dataset.palette, blended) if save_images else None,
            progress=is_main(),
        )
        matrix = scores.pop("confusion", None)
        if is_main():
            if matrix is not None:
                picture = file.with_name(f"confusion_{suffix}.png")
                write_picture(picture, confusion_picture(matrix.numpy(), dataset.classes))
                click.echo(f"written to {picture}")
            for key in filter(scores.__contains__, PER_CLASS):
                scores[key] = dict(zip(dataset.classes, scores[key], strict=True))
            conditions = {"multiscale": not singlescale, "n_images": n_images} | conditions_of(run, dataset, windows)
            record(file, conditions, scores)
            _show(scores)
            click.echo(f"written to {file}")


def conditions_of(run: Run, dataset: SegmentationDataset, windows: Windows) -> dict[str, Any]:
    """The settings that scores depend on, merging among them under its keys in `variant.yml`; sizes in pixels."""
    return {
        "checkpoint": checkpoint_file(run.path).name,
        "dataset": dataset.name,
        "split": dataset.split,
        "image_size": min(scaled(dataset.image_size, run.ratio)),
        "window_size": list(windows.size),
        "window_stride": list(windows.stride),
        "window_batch_size": windows.batch_size,
        "precision": run.precision_name,
        **({} if run.scale == SCALES[0] else {"scale": run.scale}),
        **run.merging,
    }


def record(file: Path, conditions: dict[str, Any], scores: dict[str, Any]) -> None:
    """Add an entry to a file of scores; one of the same conditions is replaced.

    Raises:
        ValueError: the file is damaged.
        OSError: it cannot be written.
    """
    others = [entry for entry in read_entries(file) if entry.get("conditions") != conditions]
    write_text(file, yaml.safe_dump([*others, {"conditions": conditions, **scores}], sort_keys=False))


def read_entries(file: Path) -> list[dict[str, Any]]:
    """The entries of a file of scores, oldest first; none if it does not exist.

    The only entry of a file that an older version wrote has no conditions.

    Raises:
        ValueError: the file is damaged.
    """
    if not file.exists():
        return []
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged, move it away: {one_line(error)}") from error
    entries = found if isinstance(found, list) else [found]
    if not all(isinstance(entry, dict) for entry in entries):
        raise ValueError(f"{file} holds no scores, move it away")
    return entries


def _image_writer(folder: Path, palette: np.ndarray, blended: bool) -> Callable[[Sample, Tensor], None]:
    """Callback of `Run.evaluate` that writes the label map and the blend of an image."""

    def write(sample: Sample, labels: Tensor) -> None:
        picture = labels.cpu().numpy().astype(label_type(len(palette)))
        write_picture(folder / f"{sample.name}.png", picture)
        if blended:
            write_picture(folder / f"{sample.name}_blend.jpg", blend(sample.photo, colorize(picture, palette)))

    return write


def _show(scores: dict[str, Any]) -> None:
    show_scores(scores)
    if "boundary_iou" in scores:
        click.echo(f"boundary_iou: {scores['boundary_iou']:.2f}")
    for key in filter(scores.__contains__, PER_CLASS):
        click.echo(f"{key}:")
        for name, iou in scores[key].items():
            click.echo(f"  {name}: {'-' if iou is None else f'{iou:.2f}'}")


if __name__ == "__main__":
    main()
