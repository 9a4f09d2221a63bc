"""Inspect all files of a data set: are they there, do sizes fit, what do the masks hold?"""

import click

from segm.cli import Command, dataset_argument
from segm.data import create_dataset
from segm.data.inventory import Inventory, copies, inspect_dataset


@click.command(cls=Command)
@dataset_argument
@click.option(
    "--masks",
    "n_masks",
    type=click.IntRange(min=1),
    help="Count the labels of so many masks per split.  [default: all]",
)
def main(dataset_name: str, n_masks: int | None) -> None:
    """Inspect DATASET, below $DATASET, before a training.

    Prints the content of every split, and a line "warning: ..." for everything suspicious. Ends with a status other
    than 0 where a training would be impossible.
    """
    found: dict[str, Inventory | None] = {}
    datasets = {}
    for split in ("train", "val", "test"):
        try:
            dataset = create_dataset(dataset_name, split)
        except (FileNotFoundError, ValueError) as error:
            if split != "test":
                raise
            click.echo(f"test: none, {error}")
            continue
        found[split] = inspect_dataset(dataset, n_masks=n_masks, progress=True)
        if found[split] is None:
            raise ValueError(f"{dataset_name} has no files: its images are made in memory")
        datasets[split] = dataset
        click.echo("\n".join(found[split].lines()))
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        if first in datasets and second in datasets and (warning := copies(datasets[first], datasets[second])):
            click.echo(f"warning: {warning}")


if __name__ == "__main__":
    main()
