"""Operations of a trained Segmenter."""

import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from patch.operations import count_operations
from segm import cli
from segm.merging import MergingCommand
from segm.run import Run


@click.command(cls=MergingCommand)
@cli.checkpoint_argument
@cli.images_argument
@cli.batch_size_option
@click.option("--enc-dec", is_flag=True, help="Also print the parts of the encoder, the decoder and the rest.")
@cli.im_size_option
@cli.device_option
@cli.max_images_option
def main(
    checkpoint: Path, images: str | Path, batch_size: int, enc_dec: bool, max_images: int | None, **how: Any
) -> None:
    """Print the GFLOPs per image of CHECKPOINT on DATASET: mean and standard deviation over the images.

    Counted one per multiply-add, as fvcore counts, in one forward pass over every validation image at the crop size;
    upsampling, fused attention and the products and sums of merging are included. Operators without a count
    (element-wise work, sorting, indexing) are listed.
    """
    run = Run.load(checkpoint, amp=False, **how)
    views = run.views(images, max_images, batch_size=batch_size)
    found = [count_operations(run.model, view) for view in tqdm(views, desc="operations", unit="batch", leave=False)]
    click.echo(f"{len(views) * views.batch_size} images of {views.size[0]} x {views.size[1]} pixels")
    _show("GFLOPs", [operations.total for operations in found])
    if enc_dec:
        _show("encoder", [operations.encoder for operations in found])
        _show("decoder", [operations.decoder for operations in found])
        _show("rest", [operations.total - operations.encoder - operations.decoder for operations in found])
    uncounted = sum((Counter(operations.uncounted) for operations in found), Counter())
    calls = ", ".join(f"{name} {n / len(found):.0f}" for name, n in uncounted.most_common())
    click.echo(f"not counted (calls per pass): {calls}")


def _show(name: str, values: list[float]) -> None:
    """Mean and, of several batches, standard deviation of 10⁹ operations."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    click.echo(f"{name + ':':<9} {statistics.mean(values):.3f}{spread}")


if __name__ == "__main__":
    main()
