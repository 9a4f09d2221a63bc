"""Segment photographs that have no labels."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from segm.cli import checkpoint_argument, device_option, im_size_option, scale_option, window_option, workers_option
from segm.data import Photographs
from segm.data.dataset import label_type
from segm.data.images import SUFFIXES, count_suffixes, files_below
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
@scale_option
@window_option
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
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is no folder: give one with photographs")
    run = open_run(checkpoint, device=device, **how)
    photographs = Photographs(source, run.config.data.value_range, run.bands)
    _check_names(photographs)
    damaged: list[str] = []
    loader = read_ahead(Items(photographs, run.preprocessing), range(len(photographs)), workers, device)
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
    if others := count_suffixes({*files_below(source)} - {*photographs.files}):
        click.echo(f"not read: {others}; photographs are {', '.join(SUFFIXES)}")
    if damaged:
        raise ValueError(f"{len(damaged)} of {len(photographs)} photographs left out: {'; '.join(damaged[:5])}")


class Items(Dataset):
    """Photographs as `Item`s of one view; in place of one that is damaged, the message that says so."""

    def __init__(self, photographs: Photographs, preprocess: Callable[[np.ndarray], Tensor]) -> None:
        self.photographs, self.preprocess = photographs, preprocess

    def __getitem__(self, index: int) -> Item | str:
        try:
            photograph = self.photographs[index]
        except ValueError as error:
            return str(error)
        return Item(photograph, [self.preprocess(photograph.image)])


def _check_names(photographs: Photographs) -> None:
    """Raise a ValueError unless the names without suffix differ, since the results bear them."""
    names = Counter(photographs.name_of(index) for index in range(len(photographs)))
    name, count = names.most_common(1)[0]
    if count > 1:
        folder = photographs.folder
        raise ValueError(f"{folder} holds several photographs named {name}: rename them, the results would collide")


if __name__ == "__main__":
    main()
