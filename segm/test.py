"""Score a trained Segmenter on the validation images of its data set."""

from pathlib import Path
from typing import Any

import click
import torch

from segm import cli
from segm.exported import open_run
from segm.merging import MergingCommand
from segm.parallel import is_main, process_group


@click.command(cls=MergingCommand)
@cli.checkpoint_argument
@cli.amp_option
@cli.im_size_option
@cli.scale_option
@cli.window_option
@cli.runtime_option
@cli.device_option
@cli.max_images_option
@cli.workers_option
def main(checkpoint: Path, device: torch.device, max_images: int | None, workers: int, **how: Any) -> None:
    """Print accuracies and mIoU (percent) of CHECKPOINT: run, file, .onnx or .pt2."""
    with process_group(device) as device:
        run = open_run(checkpoint, device=device, **how)
        scores = run.evaluate(n_images=max_images, workers=workers, progress=is_main())
        if is_main():
            cli.show_scores(scores)


if __name__ == "__main__":
    main()
