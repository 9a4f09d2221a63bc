"""Segmentation scores from one confusion matrix."""

from typing import Any

import torch
from torch import Tensor


def confusion_matrix(prediction: Tensor, label: Tensor, n_cls: int) -> Tensor:
    """Count pixels by true and predicted class.

    Args:
        prediction, label: integer tensors of one shape; labels outside [0, n_cls) are ignored.
        n_cls: number of classes.

    Returns:
        (n_cls, n_cls), int64; rows are true classes.
    """
    known = (label >= 0) & (label < n_cls)
    pairs = label[known].long() * n_cls + prediction[known].long()
    return torch.bincount(pairs, minlength=n_cls**2).view(n_cls, n_cls)


def segmentation_scores(confusion: Tensor) -> dict[str, Any]:
    """Scores in percent, with two decimals, as mmsegmentation computes them.

    A class that occurs neither in the truth nor in the prediction has no IoU (None) and is left out of the mean;
    likewise a class that does not occur in the truth has no accuracy.

    Args:
        confusion: (C, C), rows are true classes.

    Returns:
        dict with `pixel_accuracy`, `mean_accuracy`, `mean_iou` (floats), `per_class_iou` (list of C floats or None) and
        `n_scored` (number of classes that the mean is over).

    Raises:
        ValueError: no pixel is labelled.
    """
    confusion = confusion.double()
    hit, truth, predicted = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    if not truth.any():
        raise ValueError("nothing to score: no pixel of these images is labelled; are there masks in this split?")
    iou = hit / (truth + predicted - hit)
    return {
        "pixel_accuracy": _percent(hit.sum() / truth.sum()),
        "mean_accuracy": _percent((hit / truth).nanmean()),
        "mean_iou": _percent(iou.nanmean()),
        "per_class_iou": [None if value.isnan() else _percent(value) for value in iou],
        "n_scored": int((~iou.isnan()).sum()),
    }


def _percent(fraction: Tensor) -> float:
    return round(100 * fraction.item(), 2)
