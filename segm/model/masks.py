"""What decoders of queries share: masks with class scores, and how they become scores of pixels."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segm.model.upsample import upsample, upsampled_bands


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
    covered = upsample(found.masks, size).sigmoid_()  # the largest tensor of the pass: not held twice
    return (covered.flatten(2).mT @ probabilities).mT.unflatten(2, tuple(size))


def best_classes(found: Prediction, size: Sequence[int]) -> Tensor:
    """`class_scores(found, size).argmax(1)`, but for ties, without the masks and scores of the whole image.

    Returns:
        (B, *size), int64.
    """
    probabilities = found.classes.float().softmax(-1)[..., :-1]
    labels = torch.empty(len(probabilities), *size, dtype=torch.long, device=probabilities.device)
    for own, masks, weights in zip(labels, found.masks.float(), probabilities, strict=True):
        for band, part in upsampled_bands(masks, size):
            scores = part.sigmoid_().flatten(1).mT @ weights
            own[band] = scores.argmax(-1).unflatten(0, part.shape[1:])
    return labels
