"""Sliding-window inference, as in the released evaluation of Segmenter."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from segm.model.upsample import bilinear_places, resized_label_map, upsample
from segm.sizes import Size, pair

Model = Callable[[Tensor], Tensor]
Region = tuple[int, int, int, int]  # first and behind the last row, first and behind the last column
MOST_PIXELS = 1 << 21  # 2048×1024: logits of larger images are held in bands
BAND_PIXELS = 1 << 20


@dataclass(frozen=True)
class Windows:
    """How an image is cut into windows.

    Attributes:
        size: (height, width), pixels.
        stride: pixels between windows, down and across.
        batch_size: windows per forward pass.
    """

    size: tuple[int, int]
    stride: tuple[int, int]
    batch_size: int = 4

    def __post_init__(self) -> None:
        if not all(1 <= stride <= side for side, stride in zip(self.size, self.stride, strict=True)):
            raise ValueError(f"window {self.size} with stride {self.stride}: give 1 ≤ stride ≤ window")
        if self.batch_size < 1:
            raise ValueError(f"window batch size {self.batch_size}: give at least 1")

    @classmethod
    def of(cls, size: Size, stride: Size, batch_size: int = 4) -> "Windows":
        """Windows whose size and stride may be one number."""
        return cls(pair(size), pair(stride), batch_size)


def window_starts(side: int, window: int, stride: int) -> list[int]:
    """First pixels of the windows along one side: multiples of the stride, and one flush with the far edge."""
    last = max(side - window, 0)
    return [*range(0, last, stride), last]


def sliding_logits(model: Model, image: Tensor, windows: Windows, region: Region | None = None) -> Tensor:
    """Logits of an image of any size, averaged where windows overlap.

    Args:
        model: images (B, 3, h, w) -> logits (B, C, h, w).
        image: (3, H, W), normalized.
        windows: `Windows`.
        region: the pixels that are asked for, of the scaled image; None: all.

    Returns:
        (C, H', W'), or the region of it; an image that does not cover a window is scaled up first.
    """
    image = _at_least(image.unsqueeze(0), windows.size)
    height, width = image.shape[-2:]
    high, wide = windows.size
    top, bottom, left, right = region or (0, height, 0, width)
    rows = [t for t in window_starts(height, high, windows.stride[0]) if t < bottom and t + high > top]
    columns = [c for c in window_starts(width, wide, windows.stride[1]) if c < right and c + wide > left]
    corners = [(t, c) for t in rows for c in columns]
    total, count = image.new_empty(0), image.new_zeros(bottom - top, right - left)
    for first in range(0, len(corners), windows.batch_size):
        some = corners[first : first + windows.batch_size]
        crops = torch.cat([image[..., t : t + high, c : c + wide] for t, c in some])
        logits = model(crops).float()
        if not total.numel():
            if len(corners) == 1 and region is None:
                return logits[0]
            total = logits.new_zeros(logits.shape[1], *count.shape)
        for (t, c), own in zip(some, logits, strict=True):
            inside = (
                slice(max(t - top, 0), max(t + high - top, 0)),
                slice(max(c - left, 0), c + wide - left),
            )
            part = own[:, max(top - t, 0) : bottom - t, max(left - c, 0) : right - c]
            total[:, *inside] += part
            count[inside] += 1
    return total.div_(count)


def _at_least(image: Tensor, window: tuple[int, int]) -> Tensor:
    """Scale (1, 3, H, W) up until it covers a window."""
    size = _at_least_size(image.shape[-2:], window)
    if size == tuple(image.shape[-2:]):
        return image
    return F.interpolate(image, size=size, mode="bilinear", align_corners=False)


def _at_least_size(size: Sequence[int], window: tuple[int, int]) -> tuple[int, int]:
    (height, width), (high, wide) = size, window
    if height >= high and width >= wide:
        return height, width
    if high / height >= wide / width:
        return high, max(int(width / height * high), wide)
    return max(int(height / width * wide), high), wide


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

    Bands across the longer side of a large image are done one by one, each with logits of about `BAND_PIXELS`.

    Args:
        model: images (B, 3, h, w) -> logits (B, C, h, w).
        views: list of (image (3, H, W), normalized, and whether it is mirrored).
        windows: `Windows`.
        size: original (height, width).

    Returns:
        (height, width), int64.
    """
    sizes = [_at_least_size(image.shape[-2:], windows.size) for image, _ in views]
    n_pixels = max(height * width for height, width in (*sizes, size))
    if n_pixels <= MOST_PIXELS and len(views) == 1:  # a softmax does not change which class is largest
        image, flipped = views[0]
        labels = resized_label_map(sliding_logits(model, image, windows), size)
        return labels.flip(-1) if flipped else labels
    if n_pixels <= MOST_PIXELS:
        return _most_probable(view_logits(model, image, flipped, windows, size) for image, flipped in views)
    axis, n_bands = 0 if size[0] > size[1] else 1, -(-n_pixels // BAND_PIXELS)
    edges = [round(i * size[axis] / n_bands) for i in range(n_bands + 1)]
    bands = (
        _most_probable(_band_logits(model, image, flipped, windows, size, axis, band) for image, flipped in views)
        for band in pairwise(edges)
    )
    return torch.cat(list(bands), dim=axis)


def _most_probable(logits: Iterable[Tensor]) -> Tensor:
    """(C, H, W) of every view -> (H, W), int64."""
    return reduce(torch.add, (one.softmax(0) for one in logits)).argmax(0)


def _band_logits(
    model: Model,
    image: Tensor,
    flipped: bool,
    windows: Windows,
    size: tuple[int, int],
    axis: int,
    band: tuple[int, int],
) -> Tensor:
    """Logits of the pixels from band[0] to below band[1] of a side of an image, at its original size.

    Args:
        flipped: whether the view is mirrored; the logits are mirrored back.
        axis: 0: the band has all columns, 1: all rows.

    Returns:
        (C, height, width) of the band.
    """
    first, last = band
    if flipped and axis == 1:
        first, last = size[1] - last, size[1] - first
    height, width = _at_least_size(image.shape[-2:], windows.size)
    old = (height, width)[axis]
    above, below, weight = bilinear_places(old, size[axis], image.device)
    above, below, weight = above[first:last], below[first:last], weight[first:last]
    start, end = int(above[0]), int(below[-1]) + 1
    region = (start, end, 0, width) if axis == 0 else (0, height, start, end)
    logits = sliding_logits(model, image, windows, region)
    weight = weight[:, None] if axis == 0 else weight
    mixed = torch.lerp(
        logits.index_select(axis + 1, above - start), logits.index_select(axis + 1, below - start), weight
    )
    other = (last - first, size[1]) if axis == 0 else (size[0], last - first)
    mixed = upsample(mixed.unsqueeze(0), other)[0]  # along the other side; this one has its size
    return mixed.flip(-1) if flipped else mixed
