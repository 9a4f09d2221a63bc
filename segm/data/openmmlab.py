"""The one place that imports mmcv and mmseg, so that their import stays silent, and the training pipeline made of them.

`mmseg` prints two lines about OneDL and warns about compiled operators that nothing here needs. The classes
are used directly, not by name, so nothing has to be registered and no global scope is set.
"""

import contextlib
import io
import math
import warnings
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from segm.data.dataset import IGNORE_LABEL
from segm.data.images import Normalization, get_normalization, normalize
from segm.errors import TRAINING
from segm.sizes import Size, pair

try:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mmseg.datasets as mmseg_datasets
        from mmcv.transforms import Normalize, Pad, RandomResize
        from mmseg.datasets import BaseSegDataset
        from mmseg.datasets.transforms import PhotoMetricDistortion, RandomCrop
        from mmseg.datasets.transforms.transforms import RandomFlip, Resize
except ModuleNotFoundError as error:
    raise ValueError(f"labelled data sets are read by mmsegmentation, which is not installed: {TRAINING}") from error

__all__ = ["BaseSegDataset", "Resize", "TrainTransform", "mmseg_datasets"]


class TrainTransform:
    """The published training pipeline (Segmenter, after mmsegmentation).

    Random resize, by 0.5 to 2.0 in the publication, random crop in which no class covers more than 75 %, flip,
    photometric distortion, normalization, padding to the crop size. It draws from numpy's global generator: see
    `segm.data.dataset.seeded`.

    Args:
        scale: (long, short) side at ratio 1, pixels.
        crop_size: of the result, pixels.
        normalization: name, or mean and standard deviation.
        ratios: of the random resize, lowest and highest.
        ignored: label of ignored pixels, and of those that are padded.
        flip: whether half of the images are mirrored.
        n_bands: channels of the images; the distortion is one of three.
    """

    def __init__(
        self,
        scale: tuple[int, int],
        crop_size: Size,
        normalization: str | Normalization,
        ratios: tuple[float, float] = (0.5, 2.0),
        ignored: int = IGNORE_LABEL,
        flip: bool = True,
        n_bands: int = 3,
    ) -> None:
        height, width = pair(crop_size)
        mean, std = (255 * np.array(v) for v in get_normalization(normalization))
        self._scale, self._lowest = scale, ratios[0]
        self.size, self.normalization, self.ignored, self.n_bands = (height, width), normalization, ignored, n_bands
        self.steps: tuple[Any, ...] = (
            RandomResize(scale, ratio_range=ratios, resize_type=Resize, keep_ratio=True),
            RandomCrop((height, width), cat_max_ratio=0.75, ignore_index=ignored),
            RandomFlip(prob=0.5 if flip else 0.0),
        )
        if n_bands == 3:
            pad = Pad(size=(width, height), pad_val={"img": 0, "seg": ignored})
            self.steps += (PhotoMetricDistortion(), Normalize(mean, std, to_rgb=True), pad)

    def __call__(self, image: np.ndarray, label: np.ndarray) -> dict[str, torch.Tensor]:
        """image: uint8 RGB (H, W, 3), label: uint8 (H, W) -> image float32 (3, h, w), label int64 (h, w)."""
        image, label = self._not_too_thin(image, label)
        is_rgb = self.n_bands == 3
        # The transforms expect OpenCV's BGR, as mmcv's loader gives it; Normalize turns it back to RGB.
        results: dict[str, Any] = {
            "img": cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if is_rgb else image,
            "img_shape": image.shape[:2],
            "gt_seg_map": label,
            "seg_fields": ["gt_seg_map"],
        }
        for step in self.steps:
            results = step(results)
        labels = torch.from_numpy(results["gt_seg_map"].astype(np.int64))
        if is_rgb:
            return {"image": torch.from_numpy(np.ascontiguousarray(results["img"].transpose(2, 0, 1))), "label": labels}
        pixels = normalize(results["img"].reshape(*labels.shape, -1), self.normalization)
        sides = (0, self.size[1] - labels.shape[1], 0, self.size[0] - labels.shape[0])  # mmcv pads 4 bands at most
        return {"image": F.pad(pixels, sides), "label": F.pad(labels, sides, value=self.ignored)}

    def _not_too_thin(self, image: np.ndarray, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Image and labels, padded where the smallest resize would leave a side without pixels, as at the end."""
        (long, short), (low, high) = self._scale, sorted(image.shape[:2])
        smallest = min(long / high, short / low) * self._lowest
        missing = math.ceil(0.5 / smallest) - low
        if missing <= 0:
            return image, label
        more = [(0, missing if side == low else 0) for side in image.shape[:2]]
        if image.shape[0] == image.shape[1]:
            more[1] = (0, 0)
        return np.pad(image, [*more, (0, 0)]), np.pad(label, more, constant_values=self.ignored)
