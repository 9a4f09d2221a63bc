"""Sliding-window inference, as in the released evaluation of Segmenter."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from segm.model.upsample import resized_label_map, upsample

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Windows:
    """How an image is cut into windows.

    Attributes:
        size: pixels per side.
        stride: pixels between windows.
        batch_size: windows per forward pass.
    """

    size: int
    stride: int
    batch_size: int = 4

    def __post_init__(self) -> None:
        if self.size < 1 or not 1 <= self.stride <= self.size:
            raise ValueError(f"window {self.size} with stride {self.stride}: give 1 ≤ stride ≤ window")
        if self.batch_size < 1:
            raise ValueError(f"window batch size {self.batch_size}: give at least 1")


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side: multiples of the stride, and one flush with the far edge."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]


def sliding_logits(model: Model, image: Tensor, windows: Windows) -> Tensor:
    """Logits of an image of any size, averaged where windows overlap.

    Args:
        model: images (B, 3, h, w) -> logits (B, C, h, w).
        image: (3, H, W), normalized.
        windows: `Windows`.

    Returns:
        (C, H', W'); an image whose shorter side is below the window is scaled up to it first.
    """
    image = _at_least(image.unsqueeze(0), windows.size)
    height, width = image.shape[-2:]
    rows = window_starts(height, windows.size, windows.stride)
    columns = window_starts(width, windows.size, windows.stride)
    corners = [(top, left) for top in rows for left in columns]
    total, count = image.new_empty(0), image.new_zeros(height, width)
    for first in range(0, len(corners), windows.batch_size):
        some = corners[first : first + windows.batch_size]
        crops = torch.cat([image[..., t : t + windows.size, left : left + windows.size] for t, left in some])
        logits = model(crops).float()
        if not total.numel():
            if len(corners) == 1:
                return logits[0]
            total = logits.new_zeros(logits.shape[1], height, width)
        for (top, left), window_logits in zip(some, logits, strict=True):
            total[:, top : top + windows.size, left : left + windows.size] += window_logits
            count[top : top + windows.size, left : left + windows.size] += 1
    return total.div_(count)


def _at_least(image: Tensor, side: int) -> Tensor:
    """Scale (1, 3, H, W) up until its shorter side has `side` pixels."""
    height, width = image.shape[-2:]
    if min(height, width) >= side:
        return image
    size = (side, int(width / height * side)) if height < width else (int(height / width * side), side)
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


def view_logits(model: Model, image: Tensor, flipped: bool, windows: Windows, size: tuple[int, int]) -> Tensor:
    """Logits of one view of an image, at the image's original size.

    Args:
        model: images (B, 3, h, w) -> logits (B, C, h, w).
        image: (3, H, W), normalized, and mirrored if `flipped`; the logits are mirrored back.
        windows: `Windows`.
        size: original (height, width).

    Returns:
        (C, height, width).
    """
    logits = upsample(sliding_logits(model, image, windows).unsqueeze(0), size)[0]
    return logits.flip(-1) if flipped else logits


def predict_labels(
    model: Model, views: Sequence[tuple[Tensor, bool]], windows: Windows, size: tuple[int, int]
) -> Tensor:
    """Label map from the summed class probabilities of all views of an image.

    Args:
        model, windows, size: see `view_logits`.
        views: list of (image, flipped).

    Returns:
        (height, width), int64.
    """
    if len(views) == 1:  # a softmax does not change which class is largest
        image, flipped = views[0]
        labels = resized_label_map(sliding_logits(model, image, windows), size)
        return labels.flip(-1) if flipped else labels
    logits = (view_logits(model, image, flipped, windows, size) for image, flipped in views)
    return reduce(torch.add, (one.softmax(0) for one in logits)).argmax(0)
