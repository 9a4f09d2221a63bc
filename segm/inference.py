"""Segment photographs that have no labels."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from segm.cli import checkpoint_argument, device_option, im_size_option, workers_option
from segm.data import Sample
from segm.data.dataset import label_type
from segm.data.images import SUFFIXES, count_suffixes, is_image, read_image
from segm.eval.evaluate import Item, read_ahead
from segm.merging import MergingCommand
from segm.onnx_model import open_run
from segm.storage import write_picture
from vis import blend, colorize


@click.command(cls=MergingCommand)
@checkpoint_argument
@click.option(
    "-i", "--input", "source", type=click.Path(path_type=Path), required=True, help="Folder of the photographs."
)
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
@click.option("--opacity", type=click.FloatRange(0, 1), default=0.5, help="Weight of the labels in the blends, 0 to 1.")
@im_size_option
@device_option
@workers_option
def main(
    checkpoint: Path, source: Path, target: Path, opacity: float, device: torch.device, workers: int, **how: Any
) -> None:
    """Segment every photograph in a folder with CHECKPOINT, a file, a run directory or an exported .onnx.

    Writes NAME.png (class indices, 8 bits; 16 for more than 255 classes) and NAME_blend.jpg for every photograph NAME.
    """
    if source.resolve() == target.resolve():
        raise click.UsageError(
            f"-i and -o are both {source}: results would overwrite photographs, choose another folder"
        )
    photographs = _find_photographs(source)
    run = open_run(checkpoint, device=device, **how)
    damaged: list[str] = []
    loader = read_ahead(
        Photographs(photographs, run.preprocessing, run.bands), range(len(photographs)), workers, device
    )
    for item in tqdm(loader, desc="inference", unit="image", leave=False):
        if isinstance(item, str):
            damaged.append(item)
            continue
        photograph, (view,) = item
        labels = run.predict_preprocessed(view, photograph.image.shape[:2]).astype(label_type(run.n_cls))
        write_picture(target / f"{photograph.name}.png", labels)
        picture = blend(photograph.photo, colorize(labels, run.palette), opacity)
        write_picture(target / f"{photograph.name}_blend.jpg", picture)
    click.echo(f"{len(photographs) - len(damaged)} photographs segmented, written to {target}")
    others = count_suffixes(file for file in source.iterdir() if not is_image(file) and not file.name.startswith("."))
    if others:
        click.echo(f"not read: {others}; photographs are {', '.join(SUFFIXES)}")
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(photographs)} photographs left out: {'; '.join(damaged[:5])}")


class Photographs(Dataset):
    """Photographs as `Item`s of one view; in place of one that is damaged, the message that says so."""

    def __init__(
        self, files: Sequence[Path], preprocess: Callable[[np.ndarray], Tensor], bands: Sequence[int] | None = None
    ) -> None:
        self.files, self.preprocess, self.bands = files, preprocess, bands

    def __getitem__(self, index: int) -> Item | str:
        try:
            image = read_image(self.files[index], bands=self.bands)
        except ValueError as error:
            return str(error)
        return Item(Sample(self.files[index].stem, image, None), [self.preprocess(image)])


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
