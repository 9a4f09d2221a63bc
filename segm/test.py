"""Score a trained Segmenter on the validation images of its data set."""

from pathlib import Path
from typing import Any

import click
import torch

from segm.cli import (
    amp_option,
    checkpoint_argument,
    device_option,
    im_size_option,
    max_images_option,
    show_scores,
    workers_option,
)
from segm.merging import MergingCommand
from segm.onnx_model import open_run
from segm.parallel import is_main, process_group


@click.command(cls=MergingCommand)
@checkpoint_argument
@amp_option
@im_size_option
@device_option
@max_images_option
@workers_option
def main(
    checkpoint: Path,
    amp: bool | None,
    im_size: int | None,
    device: torch.device,
    max_images: int | None,
    workers: int,
    merging: dict[str, Any],
) -> None:
    """Print pixel accuracy, mean accuracy and mIoU (percent) of CHECKPOINT, a file, a run directory or an .onnx.

    Data set, window and precision are those of the training.
    """
    with process_group(device) as device:
        run = open_run(checkpoint, device=device, merging=merging, amp=amp, im_size=im_size)
        scores = run.evaluate(n_images=max_images, workers=workers, progress=is_main())
        if is_main():
            show_scores(scores)


if __name__ == "__main__":
    main()
