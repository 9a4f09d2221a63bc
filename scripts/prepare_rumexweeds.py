"""Prepares RumexWeeds (grassland with two weeds; Güldenring et al., 2023) below DIR, as semantic segmentation.

    DIR/images/{train,val,test}/<collection>_<sequence>_*.png          5,510 photographs in all
    DIR/annotations/{train,val,test}/<collection>_<sequence>_*.png     0: background, 1: Rumex obtusifolius,
                                                                       2: Rumex crispus, 255: ignored

The release has `<collection>/seq<number>/imgs/*.png` and beside `imgs` two files of the annotation tool CVAT (version
1.1): `annotations.xml`, boxes of all plants and polygons of some, drawn by people, and `annotations_seg.xml`, polygons
of the others, made by a network. `dataset_splits/random_{train,val,test}.txt` lists images by their paths. All polygons
are filled, those by people last. A box without any polygon in it is ignored: there is a weed, but nobody says where.

ASSUMED, from the documentation and the tools of the release and not from its files: these names, that the lists name
`<collection>/seq<number>/imgs/<file>`, and that every image has an entry in `annotations.xml`, if an empty one.
ClustViT does not say which polygons and which split it took.
"""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree

import click
import cv2
import numpy as np
from prepare_common import (
    Archive,
    Member,
    Source,
    has,
    is_empty,
    open_members,
    prepare_options,
    require_pairs,
    unpack,
    write_label_map,
)
from tqdm import tqdm

ARCHIVE = Archive("RumexWeeds.zip", None, site="https://github.com/DTU-PAS/RumexWeeds")
SPLITS = {f"random_{split}.txt": split for split in ("train", "val", "test")}
LISTS, IMAGES = "dataset_splits", "imgs"
HUMAN, AUTOMATIC = "annotations.xml", "annotations_seg.xml"
LABELS = {"rumex_obtusifolius": 1, "rumex_crispus": 2}
IGNORED = 255


class Image(NamedTuple):
    """The names of an image in the release."""

    collection: str
    sequence: str
    file: str

    @classmethod
    def of(cls, path: str) -> "Image | None":
        """From a path below any folder; None: none of an image."""
        *_, collection, sequence, folder, file = ("", "", "", *PurePosixPath(path).parts)
        return cls(collection, sequence, file) if folder == IMAGES and collection else None


@dataclass
class Annotation:
    """The size of an image, pixels, its boxes (left, top, right, bottom), and its polygons, each with its label."""

    size: tuple[int, int]
    boxes: list[np.ndarray] = field(default_factory=list)
    polygons: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def draw(self) -> np.ndarray:
        """The label map, (H, W), uint8."""
        plants = np.zeros(self.size, np.uint8)
        for label, points in self.polygons:
            cv2.fillPoly(plants, [np.rint(points).astype(np.int32)], label)
        labels = plants.copy()
        for left, top, right, bottom in self.boxes:
            inside = slice(int(top), int(bottom) + 1), slice(int(left), int(right) + 1)
            if not plants[inside].any():
                labels[inside] = IGNORED
        return labels


def list_place(name: str) -> str | None:
    """The split of a list, by its path in the release; None: no list."""
    path = PurePosixPath(name)
    return SPLITS.get(path.name) if path.parent.name == LISTS else None


def read_lists(members: Iterable[Member]) -> dict[Image, str]:
    """Image -> its path without suffix below DIR/images and DIR/annotations.

    Raises:
        click.ClickException: a list is missing, or names something else than images.
    """
    lists = {list_place(member.name): member for member in members}
    found: dict[Image, str] = {}
    for file, split in SPLITS.items():
        if split not in lists:
            raise click.ClickException(f"{LISTS}/{file} is missing: is this RumexWeeds?")
        with lists[split].open() as stream:
            for line in filter(str.strip, io.TextIOWrapper(stream, "utf-8")):
                image = Image.of(line.strip())
                if image is None:
                    raise click.ClickException(f"{LISTS}/{file}: {line.strip()} is no <collection>/seq<n>/imgs/<file>")
                found[image] = f"{split}/{'_'.join(image).removesuffix('.png')}"
    return found


def read_annotations(members: Sequence[Member]) -> dict[Image, Annotation]:
    """The annotations of all images; polygons by people come last.

    Raises:
        click.ClickException: a file that is damaged, or a label that is none of `LABELS`.
    """
    found: dict[Image, Annotation] = {}
    for name in (AUTOMATIC, HUMAN):
        for member in members:
            path = PurePosixPath(member.name)
            if path.name == name and len(path.parts) > 2:
                try:
                    with member.open() as stream:
                        root = ElementTree.parse(stream).getroot()
                    _add(root, path.parts[-3], path.parts[-2], found)
                except (ElementTree.ParseError, ValueError, KeyError) as error:
                    raise click.ClickException(f"{member.name}: no annotations of CVAT 1.1 ({error})") from error
    return found


def _add(root: ElementTree.Element, collection: str, sequence: str, found: dict[Image, Annotation]) -> None:
    """Add the images of one file of CVAT to those found."""
    for entry in root.iter("image"):
        image = Image(collection, sequence, PurePosixPath(entry.attrib["name"]).name)
        own = found.setdefault(image, Annotation((int(entry.attrib["height"]), int(entry.attrib["width"]))))
        for shape in (*entry.iter("box"), *entry.iter("polygon")):
            label = LABELS.get(shape.attrib["label"])
            if label is None:
                raise ValueError(f"the label {shape.attrib['label']}, expected {' or '.join(LABELS)}")
            if shape.tag == "box":
                own.boxes.append(np.array([float(shape.attrib[side]) for side in ("xtl", "ytl", "xbr", "ybr")]))
            else:
                points = [point.split(",") for point in shape.attrib["points"].split(";")]
                own.polygons.append((label, np.array(points, dtype=float)))


@click.command()
@prepare_options
def main(folder: Path, archives: tuple[Path, ...], url: str | None, check: bool) -> None:
    """Lay RumexWeeds out below DIR for segm/data: images/{train,val,test} and annotations/{train,val,test}.

    Takes the collections and dataset_splits, which lie in DIR unpacked, or RumexWeeds.zip (see
    https://github.com/DTU-PAS/RumexWeeds; fetch it by hand), in DIR/downloads, in DIR or named with --archive. Assumed
    are the documented structure, the lists random_{train,val,test}.txt as splits, and background as a third class.
    Polygons by people and by a network are filled; a box without any is ignored. What is already there is kept."""
    source = Source(folder, (ARCHIVE,), archives, url, check)
    archive = folder if has(folder, list_place) else source.get(ARCHIVE)
    with open_members(archive) as members:
        targets = read_lists(members)
        annotations = read_annotations(members)
    missing = [image for image in targets if image not in annotations]
    if missing:
        raise click.ClickException(
            f"{archive}: {len(missing)} of {len(targets)} images have no entry in {HUMAN}, e.g. {'/'.join(missing[0])}"
        )

    def place(name: str) -> str | None:
        image = Image.of(name)
        return f"images/{targets[image]}.png" if image in targets else None

    unpack(archive, folder, place)
    maps = {image: folder / f"annotations/{target}.png" for image, target in targets.items()}
    todo = {image: target for image, target in maps.items() if is_empty(target)}
    for image, target in tqdm(todo.items(), desc="label maps", unit="file", disable=not todo):
        write_label_map(annotations[image].draw(), target)
    for split in SPLITS.values():
        require_pairs(folder / "images" / split, ".png", folder / "annotations" / split, ".png")


if __name__ == "__main__":
    main()
