"""Prepares COCO-Stuff (171 classes), version 10k or 164k, below DIR.

    10k    DIR/images/{train2014,test2014}/*.jpg, DIR/annotations/{train2014,test2014}/*_labelTrainIds.png
           9,000 and 1,000 photographs; 0: unlabelled (ignored), 1 … 171: classes (reduce_zero_label=True)
    164k   DIR/images/{train2017,val2017}/*.jpg, DIR/annotations/{train2017,val2017}/*_labelTrainIds.png
           118,287 and 5,000 photographs; 0 … 170: classes, 255: unlabelled (ignored)

Both conventions are those of mmsegmentation's COCOStuffDataset. The labels have 182 ids, 1 … 182, of which
COCO never used 11; the train id is the rank among the 171 others, from 1 in 10k and from 0 in 164k. The files
of 10k (matrix `S` of the .mat) hold the id with 0 for unlabelled, the PNGs of 164k the id minus 1 with 255 for
unlabelled. The resulting tables equal those in mmsegmentation's converters. One difference: one of the 11
unused ids, which the published data do not hold, becomes "ignored" here and is left as it is there.

No SHA-1 of these archives is published, so only their own checksums (zip) are verified.
"""

import io
from collections.abc import Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import click
import numpy as np
from prepare_common import (
    FILE_ERRORS,
    Archive,
    Source,
    is_complete,
    label_table,
    open_members,
    prepare_options,
    read_label_map,
    require_pairs,
    unpack,
)
from scipy.io import loadmat

CALVIN = "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/"
COCO = "http://images.cocodataset.org/zips/"
ARCHIVE_10K = Archive("cocostuff-10k-v1.1.zip", CALVIN + "cocostuff-10k-v1.1.zip")
MAPS_164K = Archive("stuffthingmaps_trainval2017.zip", CALVIN + "stuffthingmaps_trainval2017.zip")
IMAGES_164K = {split: Archive(f"{split}.zip", f"{COCO}{split}.zip") for split in ("train2017", "val2017")}
ARCHIVES = {"10k": (ARCHIVE_10K,), "164k": (*IMAGES_164K.values(), MAPS_164K)}
COUNTS = {"10k": {"train2014": 9000, "test2014": 1000}, "164k": {"train2017": 118287, "val2017": 5000}}
SUFFIX = "_labelTrainIds.png"

PATIENCE = 60  # seconds for one annotation file
N_IDS = 182
UNUSED_IDS = frozenset({12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91})
USED_IDS = [id_ for id_ in range(1, N_IDS + 1) if id_ not in UNUSED_IDS]
TABLE_10K = label_table({id_: rank for rank, id_ in enumerate(USED_IDS, start=1)}, other=0)
TABLE_164K = label_table({id_ - 1: rank for rank, id_ in enumerate(USED_IDS)}, other=255)


def labels_10k(stream: BinaryIO, reader: Executor) -> np.ndarray:
    """(H, W) uint8 train ids of an annotation file of 10k.

    Args:
        stream: the file.
        reader: a process of its own, which a damaged file may end.

    Raises:
        OSError: it is damaged or holds something else.
    """
    name = getattr(stream, "name", stream)
    try:
        found = reader.submit(loadmat, io.BytesIO(stream.read()), variable_names=["S"])
        ids = found.result(timeout=PATIENCE).get("S")
    except FILE_ERRORS:
        raise
    except Exception as error:  # SciPy fails at damaged files with errors of all kinds
        raise OSError(f"{name}: damaged or no MATLAB file ({type(error).__name__})") from error
    whole = isinstance(ids, np.ndarray) and ids.ndim == 2 and np.issubdtype(ids.dtype, np.number)
    if not whole or not (ids.size and ids.min() >= 0 and ids.max() <= N_IDS):
        raise OSError(f"{name}: no label map S with ids 0 … {N_IDS}")
    return TABLE_10K[ids.astype(np.uint8)]


def labels_164k(stream: BinaryIO) -> np.ndarray:
    """(H, W) uint8 train ids of an annotation file of 164k"""
    return TABLE_164K[read_label_map(stream)]


def splits_10k(archive: Path) -> dict[str, str]:
    """Split ("train2014", "test2014") of every photograph's name, from the lists in the archive."""
    splits: dict[str, str] = {}
    with open_members(archive) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if path.parent.name == "imageLists" and path.name in ("train.txt", "test.txt"):
                with member.open() as stream:
                    splits |= dict.fromkeys(stream.read().decode().split(), f"{path.stem}2014")
    if not splits:
        raise click.ClickException(f"{archive} has no imageLists/train.txt: is it the right archive?")
    return splits


def prepare_10k(folder: Path, source: Source) -> None:
    archive = source.get(ARCHIVE_10K)
    splits = splits_10k(archive)

    def place(name: str, top: str, kind: str, suffix: str) -> str | None:
        path = PurePosixPath(name)
        wanted = path.parent.name == top and path.suffix == kind and path.stem in splits
        return f"{top}/{splits[path.stem]}/{path.stem}{suffix}" if wanted else None

    unpack(archive, folder, lambda name: place(name, "images", ".jpg", ".jpg"))
    with ProcessPoolExecutor(1, get_context("spawn")) as reader:
        convert = partial(labels_10k, reader=reader)
        unpack(archive, folder, lambda name: place(name, "annotations", ".mat", SUFFIX), convert)


def prepare_164k(folder: Path, source: Source) -> None:
    def place(name: str, top: str, kind: str, suffix: str, splits: Iterable[str]) -> str | None:
        path = PurePosixPath(name)
        wanted = path.parent.name in splits and path.suffix == kind
        return f"{top}/{path.parent.name}/{path.stem}{suffix}" if wanted else None

    for split, archive in IMAGES_164K.items():
        if not is_complete(folder, {f"images/{split}/*.jpg": COUNTS["164k"][split]}):
            photos = source.get(archive)
            unpack(photos, folder, partial(place, top="images", kind=".jpg", suffix=".jpg", splits=[split]))
    maps = source.get(MAPS_164K)
    unpack(maps, folder, lambda name: place(name, "annotations", ".png", SUFFIX, IMAGES_164K), labels_164k)


def files_of(version: str) -> dict[str, int]:
    """Number of photographs and label maps by glob pattern."""
    patterns = ("images/{}/*.jpg", f"annotations/{{}}/*{SUFFIX}")
    return {pattern.format(split): n for pattern in patterns for split, n in COUNTS[version].items()}


@click.command()
@prepare_options
@click.option(
    "--version",
    type=click.Choice(["10k", "164k"]),
    default="10k",
    show_default=True,
    help="10k is the data set coco_stuff (2 GB), 164k is coco_stuff164k (20 GB). One folder for each.",
)
def main(folder: Path, archives: tuple[Path, ...], url: str | None, check: bool, version: str) -> None:
    """Download COCO-Stuff and lay it out below DIR for segm/data: images/ and annotations/ with
    *_labelTrainIds.png. What is already there is kept."""
    source = Source(folder, ARCHIVES[version], archives, url, check)
    if is_complete(folder, files_of(version)):
        click.echo(f"{folder}: already complete")
        return
    {"10k": prepare_10k, "164k": prepare_164k}[version](folder, source)
    for split in COUNTS[version]:
        require_pairs(folder / "images" / split, ".jpg", folder / "annotations" / split, SUFFIX)


if __name__ == "__main__":
    main()
