"""Prepares SUIM (underwater images, 8 classes; Islam et al., IROS 2020) below DIR.

    DIR/images/{train,test}/*.jpg          1,525 and 110 photographs
    DIR/annotations/{train,test}/*.png     0 … 7: the classes

The release (`train_val` and `TEST`, each with `images/*.jpg` and `masks/*.bmp`) is colored: the class is the number of
three bits, red, green and blue, so that blue is 1 and yellow 6. Some masks of the release have other colors, above all
between two regions: every channel counts as what it is nearer to, 0 or 255. The masks of single classes that lie in
folders below `TEST/masks` are left out.

ASSUMED, from the documentation of the release and not from its files: these names of folders and archives. The release
has no validation set of its own; the split `val` of segm/data is `TEST`, on which scores are published.
"""

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import click
import numpy as np
from PIL import Image
from prepare_common import Archive, Source, has, is_complete, prepare_options, require_pairs, unpack

SITE = "https://irvlab.cs.umn.edu/resources/suim-dataset"
ARCHIVES = {"train_val": Archive("train_val.zip", None, site=SITE), "TEST": Archive("TEST.zip", None, site=SITE)}
SPLITS = {"train_val": "train", "TEST": "test"}
COUNTS = {"train": 1525, "test": 110}
KINDS = {"images": ("images", ".jpg", ".jpg"), "annotations": ("masks", ".bmp", ".png")}  # folder, suffix, ours
BITS = np.array([4, 2, 1], np.uint8)  # of red, green and blue
FAR, STRANGE = 64, 0.25  # from 0 and 255; share of such pixels from which on a mask is none of SUIM's


def place(part: str, kind: str) -> Callable[[str], str | None]:
    """`place` of `unpack`. part: of the release; kind: "images" or "annotations"."""
    folder, suffix, own = KINDS[kind]

    def find(name: str) -> str | None:
        path = PurePosixPath(name)
        is_there = (path.parent.parent.name, path.parent.name, path.suffix.lower()) == (part, folder, suffix)
        return f"{kind}/{SPLITS[part]}/{path.stem}{own}" if is_there and path.name[0] != "." else None

    return find


def to_labels(stream: BinaryIO) -> np.ndarray:
    """A colored mask -> (H, W), uint8.

    Raises:
        OSError: no picture, or one whose colors are none of SUIM's.
    """
    with Image.open(stream) as picture:
        colors = np.asarray(picture.convert("RGB"))
    far = (np.minimum(colors, 255 - colors) > FAR).any(-1).mean()
    if far > STRANGE:
        name = getattr(stream, "name", "mask")
        raise OSError(f"{name}: {far:.0%} of the pixels have colors far from those of all classes: is this SUIM?")
    return (colors > 127).astype(np.uint8) @ BITS


@click.command()
@prepare_options
def main(folder: Path, archives: tuple[Path, ...], url: str | None, check: bool) -> None:
    """Lay SUIM out below DIR for segm/data: images/{train,test} and annotations/{train,test}.

    Takes train_val and TEST, which lie in DIR unpacked, or train_val.zip and TEST.zip from
    https://irvlab.cs.umn.edu/resources/suim-dataset (a folder of Google Drive; fetch them by hand), in DIR/downloads,
    in DIR or named with --archive. Assumed are the documented names, train_val/images/*.jpg, train_val/masks/*.bmp and
    the same in TEST. TEST becomes the split val as well. What is already there is kept."""
    patterns = {f"{kind}/{split}/*": count for kind in KINDS for split, count in COUNTS.items()}
    if is_complete(folder, patterns):
        click.echo(f"{folder}: already complete")
        return
    source = Source(folder, tuple(ARCHIVES.values()), archives, url, check)
    for part, archive in ARCHIVES.items():
        found = folder if has(folder, place(part, "annotations")) else source.get(archive)
        unpack(found, folder, place(part, "images"))
        unpack(found, folder, place(part, "annotations"), to_labels)
    for split in COUNTS:
        require_pairs(folder / "images" / split, ".jpg", folder / "annotations" / split, ".png")


if __name__ == "__main__":
    main()
