"""A look at a data set before it is believed: are all files there, and what do the masks say?"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from segm.data.dataset import SegmentationDataset
from segm.data.files import FileDataset
from segm.data.images import DECODE_ERRORS, unreadable
from segm.data.sample import IGNORE_LABEL

ORIENTATION = 0x0112  # of EXIF: 1 upright, 5 to 8 turned by a right angle
THREADS = 8  # files are waited for, not computed
LARGE_SHARE = 0.5  # of ignored pixels


@dataclass(frozen=True)
class Inventory:
    """What one split holds.

    Attributes:
        split: its name.
        n_images: number of images.
        sizes: (width, height) of the smallest and of the largest of those whose headers were read, pixels.
        n_headers: how many headers were read.
        n_masks: how many masks were counted.
        pixels: class -> labelled pixels in them.
        ignored: pixels in them that no class has.
        notes: what is suspicious, a line each.
    """

    split: str
    n_images: int
    sizes: tuple[tuple[int, int], tuple[int, int]]
    n_headers: int
    n_masks: int = 0
    pixels: dict[str, int] = field(default_factory=dict)
    ignored: int = 0
    notes: tuple[str, ...] = ()

    @property
    def sampled(self) -> str:
        """Which masks were counted, in words."""
        return "" if self.n_masks == self.n_images else f" in a sample of {self.n_masks} of {self.n_images} masks"

    @property
    def ignored_share(self) -> float:
        """Share of the pixels that no class has."""
        return self.ignored / max(1, self.ignored + sum(self.pixels.values()))

    def record(self) -> dict[str, Any]:
        """For `variant.yml` and the report page."""
        return {
            "images": self.n_images,
            "smallest": list(self.sizes[0]),
            "largest": list(self.sizes[1]),
            "masks_counted": self.n_masks,
            "pixels": dict(self.pixels),
            "ignored_pixels": self.ignored,
            "notes": list(self.notes),
        }

    def lines(self) -> list[str]:
        """For people: one line about the files, one about the labels, and one for all that is suspicious."""
        (w0, h0), (w1, h1) = self.sizes
        size = f"{w0}x{h0}" if self.sizes[0] == self.sizes[1] else f"{w0}x{h0} to {w1}x{h1}"
        lines = [f"{self.split}: {self.n_images} images of {size} pixels"]
        if self.n_masks:
            total = max(1, sum(self.pixels.values()))
            shares = ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in _largest(self.pixels))
            more = f" and {len(self.pixels) - 8} more" if len(self.pixels) > 8 else ""
            lines.append(f"  labels{self.sampled}: {shares}{more}; {100 * self.ignored_share:.1f} % ignored")
        return lines + [f"  look: {note}" for note in self.notes]


def _largest(pixels: dict[str, int]) -> list[tuple[str, int]]:
    return Counter(pixels).most_common(8)


def take_inventory(
    dataset: SegmentationDataset,
    *,
    n_masks: int | None = None,
    n_headers: int | None = None,
    skip_bad: bool = False,
    progress: bool = False,
) -> Inventory | None:
    """Look at the files of a split.

    Args:
        dataset: from `segm.data.create_dataset`.
        n_masks: count the labels of so many masks, spread over the split; None: of all.
        n_headers: read the headers of so many images and masks, likewise; None: of all.
        skip_bad: count missing and damaged files, in place of refusing the split.
        progress: show bars.

    Returns:
        `Inventory`; None for a data set without files.

    Raises:
        FileNotFoundError: images or masks are missing.
        ValueError: a header or a mask that cannot be right, or no labelled pixel.
    """
    if not isinstance(dataset, FileDataset):
        return None
    paths = [dataset.paths(index) for index in range(len(dataset))]
    bad: list[str] | None = [] if skip_bad else None
    if not skip_bad:
        _require(dataset, [image for image, _ in paths], "images")
        _require(dataset, [mask for _, mask in paths if mask is not None], "masks")
    chosen = [paths[index] for index in spread(len(paths), n_headers)]
    heads = _threads(_header, chosen, "headers", progress and n_headers is None, bad)
    if not heads:
        raise ValueError(
            f"{dataset.name} {dataset.split}: all {len(chosen)} images are bad, such as {bad[0] if bad else ''}"
        )
    sizes = sorted(((head.width, head.height) for head in heads), key=lambda size: size[0] * size[1])
    labelled = paths[0][1] is not None
    notes = [*_notes_on_files(dataset, heads)]
    if bad:
        notes.append(f"{len(bad)} of {len(chosen)} images are skipped: {bad[0]}")
    if not labelled:
        return Inventory(dataset.split, len(paths), (sizes[0], sizes[-1]), len(heads), notes=tuple(notes))
    if dataset.n_cls == 1:
        raise ValueError(
            f"{dataset.name} has one class, {dataset.classes[0]}: every pixel would be that; list the background as a "
            "class, too"
        )
    counted = spread(len(paths), n_masks)
    counts = _count(dataset, counted, progress, None if bad is None else [])
    pixels = dict(zip(dataset.classes, counts[: dataset.n_cls].tolist(), strict=True))
    found = Inventory(
        dataset.split,
        len(paths),
        (sizes[0], sizes[-1]),
        len(heads),
        len(counted),
        pixels,
        int(counts[IGNORE_LABEL]),
        tuple(notes),
    )
    return _with_notes_on_labels(found)


def spread(length: int, number: int | None) -> Sequence[int]:
    """So many indices below a length, evenly spread; None: all."""
    if number is None or number >= length:
        return range(length)
    return [int((2 * i + 1) * length / (2 * number)) for i in range(number)]


def _require(dataset: FileDataset, paths: Sequence[Path], kind: str) -> None:
    """Raise a FileNotFoundError if files are missing; names the first."""
    with ThreadPoolExecutor(THREADS) as pool:
        there = list(pool.map(Path.is_file, paths, chunksize=256))
    missing = [path for path, is_there in zip(paths, there, strict=True) if not is_there]
    if missing:
        many = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{dataset.name} {dataset.split}: {kind} are missing: {missing[0]}{many}")


@dataclass(frozen=True)
class _Head:
    width: int
    height: int
    orientation: int


def _header(pair: tuple[Path, Path | None]) -> _Head:
    """Size of an image; a mask of another size is refused."""
    image, mask = pair
    (width, height), orientation = _read_header(image)
    size = (height, width) if orientation >= 5 else (width, height)
    if mask is not None:
        own, _ = _read_header(mask)
        if own != size:
            turned = f" (its EXIF orientation {orientation} turns the image, not the mask)" if orientation != 1 else ""
            raise ValueError(
                f"{mask}: the label map is {own[0]}x{own[1]} pixels, its image {size[0]}x{size[1]}{turned}"
            )
    return _Head(*size, orientation)


def _read_header(path: Path) -> tuple[tuple[int, int], int]:
    """(width, height) as stored, and the EXIF orientation."""
    try:
        with Image.open(path) as opened:
            return opened.size, int(opened.getexif().get(ORIENTATION, 1))
    except FileNotFoundError:
        raise
    except DECODE_ERRORS as error:
        raise ValueError(unreadable(path, "image", error)) from error


def _count(dataset: FileDataset, indices: Sequence[int], progress: bool, bad: list[str] | None) -> np.ndarray:
    """(256,), int64: pixels of every label value."""

    def one(index: int) -> np.ndarray:
        label = dataset.label(index)
        return np.bincount(label.ravel(), minlength=256) if label is not None else np.zeros(256, np.int64)

    return np.sum([np.zeros(256, np.int64), *_threads(one, indices, f"{dataset.split} masks", progress, bad)], axis=0)


def _threads(
    function: Callable[[Any], Any], items: Sequence[Any], what: str, progress: bool, bad: list[str] | None
) -> list[Any]:
    """Results of a function. bad: takes what is wrong with items, which have no result then; None: that is raised."""

    def tried(item: Any) -> Any:
        try:
            return function(item)
        except (FileNotFoundError, ValueError) as error:
            if bad is None:
                raise
            bad.append(str(error))
            return None

    with ThreadPoolExecutor(THREADS) as pool:
        bar = tqdm(pool.map(tried, items), what, len(items), unit="file", leave=False, disable=not progress)
        return [result for result in bar if result is not None]


def _notes_on_files(dataset: FileDataset, heads: Sequence[_Head]) -> Iterable[str]:
    if dataset.made:
        yield f"the split was made by the program: {dataset.made}"
    turned = [head.orientation for head in heads if head.orientation != 1]
    if turned:
        common = Counter(turned).most_common(1)[0][0]
        yield (
            f"{len(turned)} of {len(heads)} images have an EXIF orientation (mostly {common}): they are turned as it "
            "says, masks are taken as stored; check one pair, or store the images upright"
        )
    spare = dataset.masks_without_image
    if spare:
        yield f"{len(spare)} masks belong to no image of this split, such as {spare[0]}"


def _with_notes_on_labels(found: Inventory) -> Inventory:
    """Add what is suspicious about the labels; raise a ValueError if nothing is labelled."""
    notes = list(found.notes)
    labelled = sum(found.pixels.values())
    if not labelled:
        raise ValueError(
            f"{found.split}: no pixel is labelled{found.sampled}: all are 255, which is ignored; masks hold class "
            "numbers from 0"
        )
    empty = [name for name, count in found.pixels.items() if not count]
    binary = (
        " Programs that paint masks write 255 for what is marked: write the class number instead."
        if (found.ignored and len(found.pixels) - len(empty) == 1)
        else ""
    )
    if empty:
        names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        many = "classes have" if len(empty) > 1 else "class has"
        notes.append(
            f"{len(empty)} listed {many} no pixel{found.sampled}: {names}. Nothing is learned about them, and scores "
            f"leave them out.{binary}"
        )
    if found.ignored_share > LARGE_SHARE:
        notes.append(f"{100 * found.ignored_share:.0f} % of the pixels are ignored (255): is that meant?")
    return Inventory(**{**found.__dict__, "notes": tuple(notes)})
