"""What decoders of queries share: masks with class scores, and how they become scores of pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor


class Prediction(NamedTuple):
    """What queries say of an image.

    Attributes:
        classes: (B, Q, K + 1), class logits of every query; the last class is "nothing in this image".
        masks: (B, Q, h, w), mask logits of every query.
    """

    classes: Tensor
    masks: Tensor


def class_scores(found: Prediction, size: Sequence[int]) -> Tensor:
    """Scores of pixels: how much the masks of a class cover them, (B, K, *size); from 0 to the number of queries.

    Classes are innermost in memory, as in the scores of all decoders: the argmax reads them side by side.
    """
    probabilities = found.classes.softmax(-1)[..., :-1]
    covered = resized(found.masks, size).sigmoid_()  # the largest tensor of the pass: not held twice
    return (covered.flatten(2).mT @ probabilities).mT.unflatten(2, tuple(size))


def resized(masks: Tensor, size: Sequence[int]) -> Tensor:
    """(B, Q, h, w) -> (B, Q, *size)"""
    return F.interpolate(masks, size=tuple(size), mode="bilinear", align_corners=False)
