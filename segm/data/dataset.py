"""All that data sets have in common: samples, training items, views, random numbers, fingerprints."""

import hashlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import Dataset

from segm.data.images import (
    Normalization,
    as_photo,
    common_range,
    find_images,
    get_normalization,
    normalize,
    read_image,
    resize_keep_ratio,
    suffixes_below,
)
from segm.errors import one_line
from segm.sizes import Size, pair

logger = logging.getLogger(__name__)

IGNORE_LABEL = 255  # of up to 255 classes
WIDE_IGNORE_LABEL = 65535  # of more
N_LOOKED_AT = 8  # files that tell how a data set stores its pictures
THREADS = 8  # of those that wait for files


def ignore_label(n_cls: int) -> int:
    """The label of pixels that are ignored, among so many classes."""
    return IGNORE_LABEL if n_cls <= IGNORE_LABEL else WIDE_IGNORE_LABEL


def label_type(n_cls: int) -> type[np.unsignedinteger]:
    """The type of label maps of so many classes."""
    return np.uint8 if n_cls <= IGNORE_LABEL else np.uint16


@dataclass(frozen=True)
class Sample:
    """An image with its label map, at its original size.

    Attributes:
        name: path of the image below the folder of its split, without suffix; "/" between folders.
        image: uint8 RGB (H, W, 3), or the bands (H, W, C) that a data set is asked for.
        label: uint8 (H, W), 255 = ignored, or uint16, 65535 = ignored, of more than 255 classes; None if the split
            has no labels.
    """

    name: str
    image: np.ndarray
    label: np.ndarray | None

    @property
    def photo(self) -> np.ndarray:
        """The image to look at: uint8 RGB (H, W, 3)."""
        return as_photo(self.image)


class SegmentationDataset(Dataset):
    """A data set for semantic segmentation; subclasses know how many samples there are and load one.

    `ds[index]` is the evaluation sample, `ds[(epoch, index)]` the augmented training item of that epoch,
    which depends on (seed, epoch, index) alone.

    Args:
        name: of the data set.
        split: "train", "val" or "test".
        classes: names, by label.
        palette: uint8 RGB (C, 3).
        image_size: pixels of the shorter side, or the (height, width) of `shapes`.
        crop_size: of the training, pixels.
        resize_factor: the longer side is at most so many times the shorter one.
        normalization: name, or mean and standard deviation.
        seed: of the augmentation.
        ratios: of the random resize in training, lowest and highest.
        flip: whether half of the training images are mirrored.
        bands: of the images, counted from 1, that are read; None: red, green and blue.

    Attributes:
        original: whether images keep their size in evaluation.
        skip_bad: whether an image that cannot be read is left out with a warning; it is refused otherwise.
        colors: (r, g, b) -> label, of masks that are RGB pictures.
        numbers: value in masks -> label; None: they are the same.
        ignored: values in masks that are ignored.
        value_range: lowest and highest value of images; None: they are stored in 8 bits.
    """

    colors: Mapping[tuple[int, ...], int] = MappingProxyType({})
    numbers: Mapping[int, int] | None = None
    ignored: frozenset[int] = frozenset({IGNORE_LABEL})
    value_range: tuple[float, float] | None = None

    def __init__(
        self,
        name: str,
        split: str,
        classes: tuple[str, ...],
        palette: np.ndarray,
        *,
        image_size: int | tuple[int, int],
        crop_size: Size,
        resize_factor: int,
        normalization: str | Normalization,
        seed: int,
        ratios: tuple[float, float] = (0.5, 2.0),
        flip: bool = True,
        bands: Sequence[int] | None = None,
    ) -> None:
        get_normalization(normalization)
        self.skip_bad = self.original = False
        self.name, self.split, self.classes = name, split, tuple(classes)
        self.palette = np.asarray(palette, dtype=np.uint8)
        self.image_size, self.crop_size, self.resize_factor = image_size, pair(crop_size), resize_factor
        self.normalization, self.seed, self.ratios, self.flip = normalization, seed, ratios, flip
        self.bands = bands

    @property
    def n_cls(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def n_bands(self) -> int:
        """Channels of the images."""
        return 3 if self.bands is None else len(self.bands)

    def __len__(self) -> int:
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """The name of the image at `index` in messages: its file, where it has one."""
        raise NotImplementedError

    def load(self, index: int) -> Sample:
        """The sample at `index` in [0, len), at its original size."""
        raise NotImplementedError

    def sources(self, index: int) -> tuple[Any, ...]:
        """The name of a sample, and size in bytes and date in ns of each of its files; nothing where it is drawn.

        With `skip_bad`, None for a file that is missing.

        Raises:
            FileNotFoundError: one is missing.
        """
        return ()

    @overload
    def __getitem__(self, item: int) -> Sample: ...
    @overload
    def __getitem__(self, item: tuple[int, int]) -> dict[str, torch.Tensor]: ...
    def __getitem__(self, item: int | tuple[int, int]) -> Sample | dict[str, torch.Tensor]:
        if isinstance(item, (tuple, list)):
            epoch, index = item
            return self.train_item(index, mix_seeds(self.seed, epoch))
        return self.eval_item(self._checked(item))

    def train_item(self, index: int, seed: int) -> dict[str, torch.Tensor]:
        """The augmented item: image float32 (3, h, w) of the crop size, label int64 (h, w), 255 = ignored.

        With `skip_bad` also `skipped`, a bool; nothing is labelled in an image that is skipped.

        Raises:
            ValueError: the split has no labels, or, without `skip_bad`, the image or its labels are damaged.
        """
        index = self._checked(index)
        try:
            return self._augmented(index, seed) | ({"skipped": torch.tensor(False)} if self.skip_bad else {})
        except (FileNotFoundError, ValueError) as error:
            if not self.skip_bad:
                raise
            logger.warning("skipped: %s", one_line(error))
            label = torch.full(self.crop_size, ignore_label(self.n_cls))
            return {"image": torch.zeros(self.n_bands, *self.crop_size), "label": label, "skipped": torch.tensor(True)}

    def eval_item(self, index: int) -> Sample:
        """The sample at an index; with `skip_bad` an empty one without labels in place of one that cannot be read."""
        try:
            return self.load(index)
        except (FileNotFoundError, ValueError) as error:
            if not self.skip_bad:
                raise
            logger.warning("left out of the scores: %s", one_line(error))
            return Sample(self.name_of(index), np.zeros((*self.crop_size, self.n_bands), np.uint8), None)

    def _augmented(self, index: int, seed: int) -> dict[str, torch.Tensor]:
        sample = self.load(index)
        if sample.label is None:
            raise ValueError(f"the split {self.split!r} of {self.name} has no labels to train with")
        with seeded(seed, index):
            return self._train_transform(sample.image, sample.label)

    def view(self, image: np.ndarray, ratio: float = 1.0) -> torch.Tensor:
        """The input of the model for a uint8 RGB image (H, W, 3): float32 (3, h, w).

        The image is resized, sides in proportion, to fit within the data set's (long, short) scale times `ratio`,
        then normalized; with `original` its own size takes the place of that scale.
        """
        short, long = sorted(image.shape[:2]) if self.original else self._scale[::-1]
        resized = resize_keep_ratio(image, int(long * ratio), int(short * ratio))
        return normalize(resized, self.normalization)

    @property
    def _scale(self) -> tuple[int, int]:
        """(long, short) side in pixels."""
        short = min(self.image_size) if isinstance(self.image_size, tuple) else self.image_size
        return self.resize_factor * short, short

    @cached_property
    def _train_transform(self) -> Callable[[np.ndarray, np.ndarray], dict[str, torch.Tensor]]:
        from segm.data.openmmlab import TrainTransform

        ignored = ignore_label(self.n_cls)
        return TrainTransform(
            self._scale, self.crop_size, self.normalization, self.ratios, ignored, self.flip, self.n_bands
        )

    def _checked(self, index: int) -> int:
        """`index` as a plain int, negative ones counted from the end."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index {index} is out of range: {self.name} {self.split} has {count} samples")
        return int(index) % count


class Part(SegmentationDataset):
    """Some images of a data set.

    Args:
        whole: the data set.
        indices: of the images, in their order.
    """

    def __init__(self, whole: SegmentationDataset, indices: Iterable[int]) -> None:
        vars(self).update(vars(whole))  # its settings
        self.whole, self.indices = whole, [*indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name_of(self, index: int) -> str:
        return self.whole.name_of(self.indices[index])

    def load(self, index: int) -> Sample:
        return self.whole.load(self.indices[index])

    def sources(self, index: int) -> tuple[Any, ...]:
        return self.whole.sources(self.indices[index])


class Photographs:
    """Photographs as a data set without classes and labels; `photographs[index]` is a `Sample`.

    Args:
        folder: with subfolders, which become part of the names; or one photograph.
        value_range: lowest and highest value of those that are not stored in 8 bits; None: judged by a few of them.
        bands: see `segm.data.images.read_image`.

    Raises:
        FileNotFoundError: there is no such folder, or no photograph in it.
    """

    def __init__(
        self,
        folder: str | Path,
        value_range: tuple[float, float] | None = None,
        bands: Sequence[int] | None = None,
    ) -> None:
        path, self.bands = Path(folder), bands
        self.folder = path.parent if path.is_file() else path
        self.name = str(folder)
        self.files = [path] if path.is_file() else find_images(path)
        if not self.files:
            raise FileNotFoundError(f"no photograph below {folder}; {suffixes_below(self.folder)}")
        looked_at = [self.files[index] for index in spread(N_LOOKED_AT, len(self.files))]
        self.value_range = value_range or common_range(looked_at)

    def __len__(self) -> int:
        return len(self.files)

    def name_of(self, index: int) -> str:
        """The path of a photograph below the folder, without suffix; "/" between folders."""
        return self.files[index].relative_to(self.folder).with_suffix("").as_posix()

    def __getitem__(self, index: int) -> Sample:
        image = read_image(self.files[index], value_range=self.value_range, bands=self.bands)
        return Sample(self.name_of(index), image, None)


def spread(number: int | None, total: int) -> list[int]:
    """`number` indices out of `total`, at equal distances, because neighbors are often alike; None: all."""
    number = total if number is None else min(number, total)
    return [index * total // number for index in range(number)]


# ------------------------------------------------------------------------------------------- fingerprints

SETTINGS = (
    "name", "split", "classes", "image_size", "crop_size", "resize_factor", "normalization", "seed", "ratios",
    "flip", "bands", "colors", "numbers", "value_range",
)  # fmt: skip


def fingerprint(dataset: SegmentationDataset, *conditions: Any, dates: bool = True) -> str:
    """A hash of all that the items of a data set depend on.

    Args:
        dataset: its settings and classes count, and the names, sizes and dates of its files.
        conditions: everything else that a result depends on: texts, numbers, and tuples of them.
        dates: whether the dates of files count, which a copy of them does not keep.

    Returns:
        16 hexadecimal digits.

    Raises:
        FileNotFoundError: a file is missing.
    """
    settings = {name: getattr(dataset, name) for name in SETTINGS} | {"ignored": sorted(dataset.ignored)}
    digest = hashlib.sha256(repr((settings, conditions)).encode())
    with ThreadPoolExecutor(THREADS) as pool:
        for found in pool.map(dataset.sources, range(len(dataset))):
            digest.update(repr(found if dates else _without_dates(found)).encode())
    return digest.hexdigest()[:16]


def _without_dates(source: tuple[Any, ...]) -> tuple[Any, ...]:
    """The name of a sample, and the sizes of its files alone."""
    return source[:1] + tuple(state and state[0] for state in source[1:])


# ------------------------------------------------------------------------------------------- random numbers


def mix_seeds(*numbers: int) -> int:
    """One 64-bit seed from several non-negative numbers; order matters."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seed numpy's and Python's global generators, which mmcv's transforms use; restore them at the end."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(np.random.SeedSequence(numbers).generate_state(4))
    random.seed(mix_seeds(*numbers))
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
