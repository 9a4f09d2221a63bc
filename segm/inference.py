"""Segment photographs that have no labels."""

from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tqdm import tqdm

from segm.cli import checkpoint_argument, device_option, im_size_option
from segm.data.images import SUFFIXES, count_suffixes, is_image, read_image
from segm.exported import open_run
from segm.files import write_picture
from segm.merging import MergingCommand
from vis import blend, colorize


@click.command(cls=MergingCommand)
@checkpoint_argument
@click.option("-i", "--input", "source", type=click.Path(path_type=Path), required=True, help="Folder of photographs.")
@click.option(
    "-o", "--output", "target", type=click.Path(path_type=Path), required=True, help="Folder for the results."
)
@click.option(
    "--opacity",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Opacity of the labels in the blends, 0 to 1.",
)
@im_size_option
@device_option
def main(
    checkpoint: Path,
    source: Path,
    target: Path,
    opacity: float,
    im_size: int | None,
    device: torch.device,
    merging: dict[str, Any],
) -> None:
    """Segment every photograph in a folder with CHECKPOINT, a file, a run directory or an exported .onnx.

    Writes NAME.png (8-bit class indices) and NAME_blend.jpg for every photograph NAME.
    """
    if source.resolve() == target.resolve():
        raise click.UsageError(
            f"-i and -o are both {source}: results would overwrite photographs, choose another folder"
        )
    photographs = _find_photographs(source)
    run = open_run(checkpoint, device=device, merging=merging, im_size=im_size)
    damaged: list[str] = []
    for file in tqdm(photographs, desc="inference", unit="image", leave=False):
        try:
            image = read_image(file)
        except ValueError as error:
            damaged.append(str(error))
            continue
        labels = run.predict(image).astype(np.uint8)
        write_picture(target / f"{file.stem}.png", labels)
        write_picture(target / f"{file.stem}_blend.jpg", blend(image, colorize(labels, run.palette), opacity))
    click.echo(f"{len(photographs) - len(damaged)} photographs segmented, written to {target}")
    others = count_suffixes(file for file in source.iterdir() if not is_image(file) and not file.name.startswith("."))
    if others:
        click.echo(f"not read: {others}; photographs are {', '.join(SUFFIXES)}")
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(photographs)} photographs left out: {'; '.join(damaged[:5])}")


def _find_photographs(folder: Path) -> list[Path]:
    """Photographs of a folder by name; their names without suffix must differ, since the results bear them."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: give one with photographs")
    files = sorted(file for file in folder.iterdir() if is_image(file))
    if not files:
        raise ValueError(f"no photograph in {folder}: expected files ending in {', '.join(SUFFIXES)}")
    stems = [file.stem for file in files]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        raise ValueError(f"{folder} holds several photographs named {twice}: rename them, the results would collide")
    return files


if __name__ == "__main__":
    main()
