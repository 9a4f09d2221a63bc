"""Scores: from one confusion matrix, and the boundary IoU (Cheng et al., CVPR 2021), which says how well a prediction
follows the edges of what it labels."""

import math
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from segm import parallel

RATIO = 0.02  # width of a boundary, of the image's diagonal (section 3)


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


class BoundaryCount:
    """Counts, image by image, the pixels near the edges of every class.

    The boundary of a class is the part of it that is at most 2 % of the image's diagonal away from another class or
    from the border of the image. Boundary IoU compares those of truth and prediction, over all images together.
    """

    def __init__(self, n_cls: int) -> None:
        self.counts = torch.zeros(2, n_cls, dtype=torch.long)  # both, either

    def add(self, prediction: np.ndarray, label: np.ndarray) -> None:
        """Count one image; pixels without a label are left out.

        Args:
            prediction, label: (H, W), integers.
        """
        known = label < self.counts.shape[1]
        width = max(1, round(RATIO * math.hypot(*label.shape)))
        for index in np.union1d(np.unique(prediction), np.unique(label[known])).tolist():
            if index < self.counts.shape[1]:
                true, found = (inner_boundary(labels == index, width) & known for labels in (label, prediction))
                self.counts[0, index] += int((true & found).sum())
                self.counts[1, index] += int((true | found).sum())

    def scores(self, device: torch.device | str = "cpu") -> dict[str, Any]:
        """`boundary_iou`, the mean over the classes, and `per_class_boundary_iou`; percent, None where no class is.

        All processes call it, and get the scores of all images; `device` is where they meet.
        """
        both, either = parallel.all_reduce_sum(self.counts.to(device)).cpu().double()
        iou = 100 * both / either
        per_class = [None if value.isnan() else round(value.item(), 2) for value in iou]
        return {"boundary_iou": round(iou.nanmean().item(), 2), "per_class_boundary_iou": per_class}


def inner_boundary(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask that are at most `width` away from its outside; outside is also what is off the image.

    Args:
        mask: (H, W), bool.
        width: pixels, along the axes or the diagonals.

    Returns:
        (H, W), bool.
    """
    kernel = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
    inside = cv2.erode(mask.astype(np.uint8), kernel, borderType=cv2.BORDER_CONSTANT, borderValue=0)
    return mask & (inside == 0)
