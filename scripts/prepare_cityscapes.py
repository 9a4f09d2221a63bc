"""Prepares Cityscapes (19 classes) below DIR.

    DIR/leftImg8bit/{train,val,test}/<city>/*_leftImg8bit.png               2,975, 500 and 1,525 photographs
    DIR/gtFine/{train,val,test}/<city>/*_gtFine_labelTrainIds.png           0 … 18: the classes, 255: ignored

The two archives need a log-in, so they are given as local files. The label maps with train ids, which the
archive does not have, are made from its `*_gtFine_labelIds.png`: every pixel of those holds an id of the
official table (cityscapesScripts, `helpers/labels.py`), and the id alone decides the train id. The test set's
label maps are dummies of the archive and are converted like the others.
"""

from pathlib import Path

import click
from prepare_common import (
    Archive,
    Source,
    is_complete,
    is_empty,
    label_table,
    prepare_options,
    read_label_map,
    require_pairs,
    unpack,
    write_label_map,
)
from tqdm import tqdm

SITE = "https://www.cityscapes-dataset.com/downloads/"
LABELS = Archive("gtFine_trainvaltest.zip", None, "99f532cb1af174f5fcc4c5bc8feea8c66246ddbc", SITE)
IMAGES = Archive("leftImg8bit_trainvaltest.zip", None, "2c0b77ce9933cc635adda307fbba5566f5d9d404", SITE)

IMAGE_COUNTS = {"leftImg8bit/train/*/*_leftImg8bit.png": 2975, "leftImg8bit/val/*/*_leftImg8bit.png": 500}
LABEL_COUNTS = {"gtFine/train/*/*_gtFine_labelIds.png": 2975, "gtFine/val/*/*_gtFine_labelIds.png": 500}
IDS, TRAIN_IDS = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"

IGNORED = 255
TRAIN_ID_OF = {
    7: 0,  # road
    8: 1,  # sidewalk
    11: 2,  # building
    12: 3,  # wall
    13: 4,  # fence
    17: 5,  # pole
    19: 6,  # traffic light
    20: 7,  # traffic sign
    21: 8,  # vegetation
    22: 9,  # terrain
    23: 10,  # sky
    24: 11,  # person
    25: 12,  # rider
    26: 13,  # car
    27: 14,  # truck
    28: 15,  # bus
    31: 16,  # train
    32: 17,  # motorcycle
    33: 18,  # bicycle
}


def unpack_missing(folder: Path, source: Source, archive: Archive, top: str, counts: dict[str, int]) -> None:
    """Unpack the archive's folder `top` without license and readme, unless all its files are there."""
    if not is_complete(folder, counts):
        unpack(source.get(archive), folder, lambda name: name if name.startswith(top) else None)


def convert_labels(folder: Path) -> None:
    """Write the label map with train ids beside every one with ids, where it is missing."""
    table = label_table(TRAIN_ID_OF, IGNORED)
    sources = sorted((folder / "gtFine").glob(f"*/*/*{IDS}"))
    pairs = [(path, path.with_name(path.name.removesuffix(IDS) + TRAIN_IDS)) for path in sources]
    todo = [(path, target) for path, target in pairs if is_empty(target)]
    for path, target in tqdm(todo, desc="train ids", unit="file", disable=not todo):
        write_label_map(table[read_label_map(path)], target)


@click.command()
@prepare_options
def main(folder: Path, archives: tuple[Path, ...], url: str | None, check: bool) -> None:
    """Lay Cityscapes out below DIR for segm/data: leftImg8bit and gtFine with labelTrainIds.

    Needs gtFine_trainvaltest.zip and leftImg8bit_trainvaltest.zip from
    https://www.cityscapes-dataset.com/downloads/ (log-in needed, packages 1 and 3), in DIR/downloads, in DIR
    or named with --archive. What is already there is kept."""
    source = Source(folder, (LABELS, IMAGES), archives, url, check)
    unpack_missing(folder, source, LABELS, "gtFine/", LABEL_COUNTS)
    unpack_missing(folder, source, IMAGES, "leftImg8bit/", IMAGE_COUNTS)
    convert_labels(folder)
    for split in ("train", "val"):
        images, labels = folder / "leftImg8bit" / split, folder / "gtFine" / split
        require_pairs(images, "_leftImg8bit.png", labels, TRAIN_IDS)


if __name__ == "__main__":
    main()
