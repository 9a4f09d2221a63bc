"""Look at all files of a data set: are they there, do sizes fit, what do the masks say?"""

import click

from segm.cli import Command, dataset_argument
from segm.data import create_dataset
from segm.data.inventory import Inventory, take_inventory


@click.command(cls=Command)
@dataset_argument
@click.option("--masks", "n_masks", type=click.IntRange(min=1), help="Count so many masks per split.  [default: all]")
def main(dataset_name: str, n_masks: int | None) -> None:
    """Look at DATASET, below $DATASET, before a training believes it.

    Prints what every split holds and, as "look:", what is suspicious. Ends with a status other than 0 where a training
    would be impossible.
    """
    found: dict[str, Inventory | None] = {}
    names: dict[str, set[str]] = {}
    for split in ("train", "val", "test"):
        try:
            dataset = create_dataset(dataset_name, split)
        except (FileNotFoundError, ValueError) as error:
            if split != "test":
                raise
            click.echo(f"test: none, {error}")
            continue
        found[split] = take_inventory(dataset, n_masks=n_masks, progress=True)
        if found[split] is None:
            raise ValueError(f"{dataset_name} has no files: its images are made in memory")
        names[split] = {dataset.name_of(index) for index in range(len(dataset))}
        click.echo("\n".join(found[split].lines()))
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        both = names.get(first, set()) & names.get(second, set())
        if both:
            click.echo(f"look: {len(both)} images are in {first} and in {second}, such as {sorted(both)[0]}")


if __name__ == "__main__":
    main()
