"""Score a trained Segmenter on a data set, single-scale or multi-scale, and save its predictions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from torch import Tensor

from segm.cli import (
    Sides,
    amp_option,
    checkpoint_argument,
    dataset_argument,
    device_option,
    im_size_option,
    max_images_option,
    show_scores,
)
from segm.data import Sample
from segm.exported import open_run
from segm.files import write_picture, write_text
from segm.merging import MergingCommand
from segm.parallel import is_main, process_group
from segm.sizes import Size
from vis import blend, colorize

PER_CLASS = ("per_class_iou", "per_class_boundary_iou")


@click.command(cls=MergingCommand)
@checkpoint_argument
@dataset_argument
@click.option(
    "--singlescale/--multiscale",
    default=True,
    show_default=True,
    help="Score at one size, or at 0.5 to 1.75 times it, mirrored as well.",
)
@click.option("--split", default="val", show_default=True, help="Split of the data set.")
@click.option("--window-size", cls=Sides, help="Side of the sliding window, pixels.  [default: the run's]")
@click.option("--window-stride", cls=Sides, help="Stride of the sliding window, pixels.  [default: the run's]")
@click.option(
    "--window-batch-size",
    type=click.IntRange(min=1),
    default=4,
    show_default=True,
    help="Number of windows per forward pass.",
)
@click.option("--boundary", is_flag=True, help="Also print the boundary IoU, of pixels near the edges of a class.")
@click.option("--save-images", is_flag=True, help="Write label maps next to the checkpoint.")
@click.option(
    "--blend/--no-blend",
    "blended",
    default=True,
    show_default=True,
    help="With --save-images, also write blends with the images.",
)
@click.option(
    "--frac-dataset",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    help="Share of the images (0 to 1), spread over the data set.",
)
@amp_option
@im_size_option
@device_option
@max_images_option
def main(
    checkpoint: Path,
    dataset_name: str,
    singlescale: bool,
    split: str,
    window_size: Size | None,
    window_stride: Size | None,
    window_batch_size: int,
    boundary: bool,
    save_images: bool,
    blended: bool,
    frac_dataset: float,
    amp: bool | None,
    im_size: int | None,
    device: torch.device,
    max_images: int | None,
    merging: dict[str, Any],
) -> None:
    """Score CHECKPOINT, a file, a run directory or an .onnx, on DATASET.

    Prints pixel accuracy, mean accuracy, mIoU and the IoU of every class (percent) and writes them to scores_ss.yml or
    scores_ms.yml next to the checkpoint; label maps (8-bit class indices) and blends go to images_ss or images_ms. Of
    another split or data set, the names say which: scores_ss_test.yml.
    """
    with process_group(device) as device:
        run = open_run(checkpoint, device=device, merging=merging, amp=amp, im_size=im_size)
        dataset, _ = run.open(split, dataset_name)
        suffix = "ss" if singlescale else "ms"
        if (dataset_name, split) != (run.dataset, "val"):  # files with other results stay as they are
            suffix += f"_{split}" if dataset_name == run.dataset else f"_{dataset_name}_{split}"
        part = max(1, round(frac_dataset * len(dataset)))
        n_images = min(part, max_images or part)
        scores = run.evaluate(
            dataset=dataset,
            windows=run.choose_windows(window_size, window_stride, window_batch_size),
            multiscale=not singlescale,
            n_images=n_images,
            boundary=boundary,
            on_image=_image_writer(run.folder / f"images_{suffix}", dataset.palette, blended) if save_images else None,
            progress=is_main(),
        )
        if is_main():
            scores |= {"checkpoint": str(checkpoint), "split": split, "n_images": n_images, **run.merging}
            for key in filter(scores.__contains__, PER_CLASS):
                scores[key] = dict(zip(dataset.classes, scores[key], strict=True))
            _report(scores, run.folder / f"scores_{suffix}.yml")


def _image_writer(folder: Path, palette: np.ndarray, blended: bool) -> Callable[[Sample, Tensor], None]:
    """Callback of `Run.evaluate` that writes the label map and the blend of an image."""

    def write(sample: Sample, labels: Tensor) -> None:
        picture = labels.cpu().numpy().astype("uint8")
        write_picture(folder / f"{sample.name}.png", picture)
        if blended:
            write_picture(folder / f"{sample.name}_blend.jpg", blend(sample.image, colorize(picture, palette)))

    return write


def _report(scores: dict[str, Any], file: Path) -> None:
    show_scores(scores)
    if "boundary_iou" in scores:
        click.echo(f"boundary_iou: {scores['boundary_iou']:.2f}")
    for key in filter(scores.__contains__, PER_CLASS):
        click.echo(f"{key}:")
        for name, iou in scores[key].items():
            click.echo(f"  {name}: {'-' if iou is None else f'{iou:.2f}'}")
    write_text(file, yaml.safe_dump(scores, sort_keys=False))
    click.echo(f"written to {file}")


if __name__ == "__main__":
    main()
