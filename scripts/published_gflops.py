"""GFLOPs of the plain Segmenter beside the published ones, which G2TM and ALGM counted with fvcore."""

import click
import torch
from benchmarking import build_model
from tqdm import tqdm

from segm.eval.operations import count_operations

# model, side of the image in pixels, classes: published GFLOPs
PUBLISHED = {
    ("T", 512, 150): 12.8,
    ("S", 512, 150): 38.6,
    ("B", 512, 150): 129.6,
    ("L", 512, 150): 400.1,
    ("S", 768, 19): 116,
    ("S", 1024, 19): 285,
    ("B", 1024, 19): 776,
}


@click.command()
def main():
    """Count the operations of every model on one image and print a table."""
    click.echo("| model | image | classes | GFLOPs | encoder | decoder | published |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- |")
    for (name, side, n_cls), published in tqdm(PUBLISHED.items(), leave=False):
        model = build_model(name, side, n_cls, torch.device("cpu"), None)
        counted = count_operations(model, torch.zeros(1, 3, side, side))
        cells = f"{counted.total:.2f} | {counted.encoder:.2f} | {counted.decoder:.2f} | {published}"
        tqdm.write(f"| {name} | {side} × {side} | {n_cls} | {cells} |")


if __name__ == "__main__":
    main()
