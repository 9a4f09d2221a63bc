"""GFLOPs of the plain Segmenter next to the published ones, which G2TM and ALGM counted with fvcore."""

import click
import torch
from benchmark import build_model
from tqdm import tqdm

from patch.operations import count_operations
from segm.cli import markdown

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
COLUMNS = {
    "model": "{model}",
    "image": "{side} × {side}",
    "classes": "{n_cls}",
    "GFLOPs": "{total:.2f}",
    "encoder": "{encoder:.2f}",
    "decoder": "{decoder:.2f}",
    "published": "{published}",
}


@click.command()
def main() -> None:
    """Count the operations of every model on one image and print a table."""
    rows = []
    for (name, side, n_cls), published in tqdm(PUBLISHED.items(), leave=False):
        with torch.device("meta"):  # no number is computed
            model = build_model(name, side, n_cls, torch.device("meta"), None)
            counted = count_operations(model, torch.zeros(1, 3, side, side))
        case = {"model": name, "side": side, "n_cls": n_cls, "published": published}
        rows.append(case | {"total": counted.total, "encoder": counted.encoder, "decoder": counted.decoder})
    click.echo(markdown(COLUMNS, rows))


if __name__ == "__main__":
    main()
