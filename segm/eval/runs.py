"""The data set, windows and images with which a run is evaluated and measured."""

import cv2
import numpy as np
import torch

from segm.data import class_info, create_dataset, dataset_defaults, normalize
from segm.eval.sliding import Windows


def open_evaluation(variant, name=None, *, split="val", window_size=None, window_stride=None, window_batch_size=4):
    """Evaluation split and windows of a run.

    Args:
        variant: content of `variant.yml`.
        name: a data set; None: that of the training. Another one is read at its own image size.
        window_size, window_stride: pixels; None: those of the run.

    Returns:
        (data set, `Windows`).

    Raises:
        ValueError: the data set has another number of classes than the model.
    """
    name = name or trained_on(variant)
    dataset = create_dataset(
        name,
        split,
        image_size=evaluation_size(variant) if name == trained_on(variant) else None,
        normalization=run_normalization(variant),
    )
    n_cls = variant["net_kwargs"]["n_cls"]
    if dataset.n_cls != n_cls:
        raise ValueError(f"{dataset.name} has {dataset.n_cls} classes, the model {n_cls}: choose its own data set")
    return dataset, evaluation_windows(variant, window_size, window_stride, window_batch_size)


def evaluation_windows(variant, window_size=None, window_stride=None, window_batch_size=4):
    """`Windows` of a run; what is None comes from its `inference_kwargs`, or else from the data set's defaults."""
    saved, table = variant.get("inference_kwargs", {}), dataset_defaults(trained_on(variant))
    size = window_size or saved.get("window_size") or table["window_size"]
    stride = window_stride or min(saved.get("window_stride") or table["window_stride"], size)
    return Windows(size, stride, window_batch_size)


def trained_on(variant):
    """Name of the data set of a run."""
    name = variant.get("dataset_kwargs", {}).get("dataset")
    if name is None:
        raise ValueError("variant.yml names no dataset in its dataset_kwargs")
    return name


def evaluation_size(variant):
    """Shorter side of the images of a run at evaluation, pixels."""
    return variant.get("inference_kwargs", {}).get("im_size") or variant["dataset_kwargs"]["image_size"]


def run_normalization(variant):
    """Name of the normalisation that a run was trained with."""
    return variant["net_kwargs"].get("normalization") or variant["dataset_kwargs"]["normalization"]


def photo_view(variant, image):
    """What the model of a run gets to see of a photograph: uint8 RGB (H, W, 3) -> float32 (3, h, w)."""
    from segm.data.transforms import resize_keep_ratio  # imports mmseg

    factor = dataset_defaults(trained_on(variant))["resize_factor"]
    side = evaluation_size(variant)
    return normalize(resize_keep_ratio(image, factor * side, side), run_normalization(variant))


def class_colors(variant):
    """Class names and palette, (C, 3) uint8 RGB, of a run; those of the user's own data stand in its variant."""
    own = variant.get("dataset_kwargs", {}).get("classes")
    if own:
        return tuple(c["name"] for c in own), np.array([c["color"] for c in own], dtype=np.uint8)
    return class_info(trained_on(variant))


def square_view(image, side, normalization):
    """An image resized to side × side (ratio not kept), as the measuring commands feed it.

    Args:
        image: (H, W, 3), uint8, RGB.

    Returns:
        (1, 3, side, side), float32, normalised.
    """
    return normalize(cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR), normalization).unsqueeze(0)


class SquareViews(torch.utils.data.Dataset):
    """Evaluation images of a run as the measuring commands feed them: batches (B, 3, crop, crop), read on demand.

    Args:
        dataset: an evaluation split of `segm.data`.
        variant: content of `variant.yml`.
        n_images: only the first so many images; None: all.
        batch_size: images per batch; what does not fill the last one is left out, unless nothing else is there.
        duplicate: fill every batch with copies of one image, so that adaptive methods keep its own token count.
        device, dtype: of the batches.
    """

    def __init__(self, dataset, variant, n_images=None, *, batch_size=1, duplicate=False, device="cpu", dtype=None):
        n_images = min(n_images or len(dataset), len(dataset))
        self.dataset, self.side = dataset, variant["dataset_kwargs"]["crop_size"]
        self.normalization = run_normalization(variant)
        self.batch_size, self.duplicate = batch_size if duplicate else min(batch_size, n_images), duplicate
        self.n_batches = n_images if duplicate else n_images // self.batch_size
        self.device, self.dtype = device, dtype

    def __len__(self):
        return self.n_batches

    def __getitem__(self, index):
        if not 0 <= index < self.n_batches:
            raise IndexError(index)
        if self.duplicate:
            return self._view(index).expand(self.batch_size, -1, -1, -1).contiguous()
        start = index * self.batch_size
        return torch.cat([self._view(i) for i in range(start, start + self.batch_size)])

    def _view(self, index):
        view = square_view(self.dataset[index].image, self.side, self.normalization)
        return view.to(device=self.device, dtype=self.dtype)
