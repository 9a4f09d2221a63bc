"""The inspection of a data set before a training: are all files there, do sizes fit, what do the masks hold?"""

import filecmp
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from segm.data.dataset import THREADS, SegmentationDataset, ignore_label, spread
from segm.data.files import FileDataset
from segm.data.stored import Header, read_header

MOST_COMPARED = 100  # files of one size
LARGE_SHARE = 0.5  # of ignored pixels


@dataclass(frozen=True)
class Inventory:
    """The content of one split.

    Attributes:
        split: its name.
        n_images: number of images.
        sizes: (width, height) of the smallest and of the largest of those whose headers were read, pixels.
        n_masks: how many masks were counted.
        pixels: class -> labelled pixels in them.
        ignored: pixels in them that no class has.
        warnings: one line for everything that is suspicious.
    """

    split: str
    n_images: int
    sizes: tuple[tuple[int, int], tuple[int, int]]
    n_masks: int = 0
    pixels: dict[str, int] = field(default_factory=dict)
    ignored: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def sampled(self) -> str:
        """The share of the masks that were counted, in words; "" for all."""
        return "" if self.n_masks == self.n_images else f" in a sample of {self.n_masks} of {self.n_images} masks"

    @property
    def ignored_share(self) -> float:
        """Share of the pixels that no class has."""
        return self.ignored / max(1, self.ignored + sum(self.pixels.values()))

    def record(self) -> dict[str, Any]:
        """The inventory as `variant.yml` and the report page keep it."""
        return {
            "images": self.n_images,
            "smallest": list(self.sizes[0]),
            "largest": list(self.sizes[1]),
            "masks_counted": self.n_masks,
            "pixels": dict(self.pixels),
            "ignored_pixels": self.ignored,
            "notes": list(self.warnings),
        }

    def lines(self) -> list[str]:
        """The inventory for people: a line about the files, one about the labels, and all warnings."""
        (w0, h0), (w1, h1) = self.sizes
        size = f"{w0}x{h0}" if self.sizes[0] == self.sizes[1] else f"{w0}x{h0} to {w1}x{h1}"
        lines = [f"{self.split}: {self.n_images} images of {size} pixels"]
        if self.n_masks:
            total = max(1, sum(self.pixels.values()))
            largest = Counter(self.pixels).most_common(8)
            shares = ", ".join(f"{name} {100 * count / total:.1f} %" for name, count in largest)
            more = f" and {len(self.pixels) - 8} more" if len(self.pixels) > 8 else ""
            lines.append(f"  labels{self.sampled}: {shares}{more}; {100 * self.ignored_share:.1f} % ignored")
        return lines + [f"  warning: {text}" for text in self.warnings]


def inspect_dataset(
    dataset: SegmentationDataset,
    *,
    n_masks: int | None = None,
    n_headers: int | None = None,
    skip_bad: bool = False,
    progress: bool = False,
) -> Inventory | None:
    """Inspect the files of a split.

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
        _require(dataset, [mask for _, mask in paths if mask is not None], "masks", dataset.what_masks_are_there)
    chosen = [paths[index] for index in spread(n_headers, len(paths))]
    heads = _threads(_header, chosen, "headers", progress and n_headers is None, bad)
    if not heads:
        raise ValueError(
            f"{dataset.name} {dataset.split}: all {len(chosen)} images are bad, such as {bad[0] if bad else ''}"
        )
    by_area = sorted(((head.width, head.height) for head in heads), key=lambda size: size[0] * size[1])
    sizes = by_area[0], by_area[-1]
    warnings = [*_warnings_of_files(dataset, heads)]
    if bad:
        warnings.append(f"{len(bad)} of {len(chosen)} images are skipped: {bad[0]}")
    if paths[0][1] is None:  # the split has no labels
        return Inventory(dataset.split, len(paths), sizes, warnings=tuple(warnings))
    if dataset.n_cls == 1:
        raise ValueError(
            f"{dataset.name} has one class, {dataset.classes[0]}: every pixel would be that; list the background as a "
            "class, too"
        )
    counted = spread(n_masks, len(paths))
    counts = _count(dataset, counted, progress, None if bad is None else [])
    pixels = dict(zip(dataset.classes, counts[: dataset.n_cls].tolist(), strict=True))
    found = Inventory(dataset.split, len(paths), sizes, len(counted), pixels, int(counts[-1]))
    return replace(found, warnings=(*warnings, *_warnings_of_labels(found)))


def copies(train: SegmentationDataset, val: SegmentationDataset, n_images: int | None = None) -> str:
    """A warning about images of a split that are in the training, too; "" where there are none.

    Files of one size are compared, byte by byte.

    Args:
        train, val: two splits.
        n_images: look at so many images of `val`, spread over it; None: at all.
    """
    if not (isinstance(train, FileDataset) and isinstance(val, FileDataset)):
        return ""
    asked = [val.paths(index)[0] for index in spread(n_images, len(val))]
    known = [train.paths(index)[0] for index in range(len(train))]
    with ThreadPoolExecutor(THREADS) as pool:
        sizes, own_sizes = (list(pool.map(_size, paths, chunksize=256)) for paths in (known, asked))
    of_size: dict[int, list[Path]] = {}
    for path, size in zip(known, sizes, strict=True):
        of_size.setdefault(size, []).append(path)
    pairs = [
        (path, other)
        for path, size in zip(asked, own_sizes, strict=True)
        for other in of_size.get(size, [])[: MOST_COMPARED if size else 0]
        if filecmp.cmp(path, other, shallow=False)
    ]
    number = len({path for path, _ in pairs})
    if not pairs:
        return ""
    return (
        f"{number} of {len(asked)} images of {val.split} are in {train.split}, too, such as {pairs[0][0]} = "
        f"{pairs[0][1]}: scores say nothing about images that were trained on"
    )


def _size(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _require(dataset: FileDataset, paths: Sequence[Path], kind: str, there_is: str = "") -> None:
    """Raise a FileNotFoundError if files are missing; names the first, and what lies there."""
    with ThreadPoolExecutor(THREADS) as pool:
        there = list(pool.map(Path.is_file, paths, chunksize=256))
    missing = [path for path, is_there in zip(paths, there, strict=True) if not is_there]
    if missing:
        many = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        there_is = there_is and f"; {there_is}"
        raise FileNotFoundError(f"{dataset.name} {dataset.split}: {kind} are missing: {missing[0]}{many}{there_is}")


def _header(pair: tuple[Path, Path | None]) -> Header:
    """Of an image, turned as it is seen; a mask of another size is refused."""
    image, mask = pair
    head = read_header(image, "image")
    if head.orientation >= 5:
        head = head._replace(width=head.height, height=head.width)
    if mask is not None:
        own = read_header(mask, "label map")
        if own[:2] != head[:2]:
            turned = head.orientation != 1
            why = f" (its EXIF orientation {head.orientation} turns the image, not the mask)" if turned else ""
            raise ValueError(
                f"{mask}: the label map is {own.width}x{own.height} pixels, its image {head.width}x{head.height}{why}"
            )
    return head


def _count(dataset: FileDataset, indices: Sequence[int], progress: bool, bad: list[str] | None) -> np.ndarray:
    """int64: pixels of every label, up to that of ignored ones."""
    nothing = np.zeros(ignore_label(dataset.n_cls) + 1, np.int64)

    def one(index: int) -> np.ndarray:
        label = dataset.label(index)
        return np.bincount(label.ravel(), minlength=len(nothing)) if label is not None else nothing

    return np.sum([nothing, *_threads(one, indices, f"{dataset.split} masks", progress, bad)], axis=0)


def _threads(
    function: Callable[[Any], Any], items: Sequence[Any], what: str, progress: bool, bad: list[str] | None
) -> list[Any]:
    """Results of a function; the faults of items without a result go to `bad`, or are raised where that is None."""

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


def _warnings_of_files(dataset: FileDataset, heads: Sequence[Header]) -> Iterable[str]:
    yield from dataset.notes
    if dataset.value_range is not None and any(head.is_deep for head in heads):
        low, high = dataset.value_range
        yield f"images are not stored in 8 bits: values of {low:g} to {high:g} become 0 to 255 (--value-range)"
    spare_bands = [head for head in heads if head.n_bands > 3]
    if spare_bands and dataset.bands is None:
        yield f"{len(spare_bands)} of {len(heads)} images have more than three bands: red, green and blue are taken"
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


def _warnings_of_labels(found: Inventory) -> Iterable[str]:
    """Everything that is suspicious about the labels; raises a ValueError if nothing is labelled."""
    if not any(found.pixels.values()):
        raise ValueError(
            f"{found.split}: no pixel is labelled{found.sampled}: all are 255, which is ignored; masks hold class "
            "numbers from 0"
        )
    empty = [name for name, count in found.pixels.items() if not count]
    if empty:
        names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        many = "classes have" if len(empty) > 1 else "class has"
        binary = found.ignored and len(found.pixels) - len(empty) == 1
        yield (
            f"{len(empty)} listed {many} no pixel{found.sampled}: {names}. Nothing is learned about them, and scores "
            "leave them out." + (" Paint programs mark with 255: write the class number instead." if binary else "")
        )
    if found.ignored_share > LARGE_SHARE:
        yield f"{100 * found.ignored_share:.0f} % of the pixels are ignored (255): is that meant?"
