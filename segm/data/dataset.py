"""What all data sets have in common: training items, evaluation samples, resized views."""

import logging
from collections.abc import Callable
from functools import cached_property
from typing import overload

import numpy as np
import torch
from torch.utils.data import Dataset

from segm.data.images import resize_keep_ratio
from segm.data.normalization import get_normalization, normalize
from segm.data.sample import IGNORE_LABEL, Sample
from segm.data.seeding import mix_seeds, seeded
from segm.errors import one_line
from segm.sizes import Size, pair

logger = logging.getLogger(__name__)


class SegmentationDataset(Dataset):
    """A data set for semantic segmentation; subclasses say how many samples there are and load one.

    `ds[index]` is the evaluation sample, `ds[(epoch, index)]` the augmented training item of that epoch,
    which depends on (seed, epoch, index) alone.

    classes: names, by label; palette: uint8 RGB (C, 3); image_size: pixels of the shorter side, or the
    (height, width) of `shapes`; crop_size: of the training, pixels; resize_factor: longer side at most this
    times the shorter; ratios: of the random resize in training, lowest and highest.
    """

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
        normalization: str,
        seed: int,
        ratios: tuple[float, float] = (0.5, 2.0),
    ) -> None:
        get_normalization(normalization)
        self.skip_bad = False  # True: an image that cannot be read is left out with a word, not refused
        self.name, self.split, self.classes = name, split, tuple(classes)
        self.palette = np.asarray(palette, dtype=np.uint8)
        self.image_size, self.crop_size, self.resize_factor = image_size, pair(crop_size), resize_factor
        self.normalization, self.seed, self.ratios = normalization, seed, ratios

    @property
    def n_cls(self) -> int:
        return len(self.classes)

    def __len__(self) -> int:
        raise NotImplementedError

    def name_of(self, index: int) -> str:
        """What a message calls the image at `index`: its file, where it has one."""
        raise NotImplementedError

    def load(self, index: int) -> Sample:
        """The sample at `index` in [0, len), at its original size."""
        raise NotImplementedError

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
        """Augmented item: image float32 (3, h, w) of the crop size, label int64 (h, w), 255 = ignore.

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
            nothing = {"image": torch.zeros(3, *self.crop_size), "label": torch.full(self.crop_size, IGNORE_LABEL)}
            return nothing | {"skipped": torch.tensor(True)}

    def eval_item(self, index: int) -> Sample:
        """The sample at an index; with `skip_bad` an empty one without labels in place of one that cannot be read."""
        try:
            return self.load(index)
        except (FileNotFoundError, ValueError) as error:
            if not self.skip_bad:
                raise
            logger.warning("left out of the scores: %s", one_line(error))
            return Sample(self.name_of(index), np.zeros((*self.crop_size, 3), np.uint8), None)

    def _augmented(self, index: int, seed: int) -> dict[str, torch.Tensor]:
        sample = self.load(index)
        if sample.label is None:
            raise ValueError(f"the split {self.split!r} of {self.name} has no labels to train with")
        with seeded(seed, index):
            return self._train_transform(sample.image, sample.label)

    def view(self, image: np.ndarray, ratio: float = 1.0) -> torch.Tensor:
        """What the model gets to see of a uint8 RGB image (H, W, 3): float32 (3, h, w).

        Resized, sides in proportion, to fit within the data set's (long, short) scale times `ratio`, then
        normalized.
        """
        long, short = self._scale
        resized = resize_keep_ratio(image, int(long * ratio), int(short * ratio))
        return normalize(resized, self.normalization)

    @property
    def _scale(self) -> tuple[int, int]:
        """(long, short) side in pixels."""
        short = min(self.image_size) if isinstance(self.image_size, tuple) else self.image_size
        return self.resize_factor * short, short

    @cached_property
    def _train_transform(self) -> Callable[[np.ndarray, np.ndarray], dict[str, torch.Tensor]]:
        from segm.data.transforms import TrainTransform

        return TrainTransform(self._scale, self.crop_size, self.normalization, self.ratios)

    def _checked(self, index: int) -> int:
        """`index` as a plain int, negative ones counted from the end."""
        count = len(self)
        if not -count <= index < count:
            raise IndexError(f"index {index} is out of range: {self.name} {self.split} has {count} samples")
        return int(index) % count
