"""Sliding-window inference, as in the released evaluation of Segmenter."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import product
from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor

from segm.model.upsample import band_bytes, upsample, whole_patches
from segm.sizes import Size, pair

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Windows:
    """Size, stride and batch size of sliding windows.

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


def upscale_to_window(image: Tensor, window: tuple[int, int]) -> Tensor:
    """Scale an image (1, 3, H, W) up until it covers a window of (height, width) pixels."""
    (height, width), (win_h, win_w) = image.shape[-2:], window
    if height >= win_h and width >= win_w:
        return image
    if win_h / height >= win_w / width:
        return upsample(image, (win_h, max(int(width / height * win_h), win_w)))
    return upsample(image, (max(int(height / width * win_w), win_h), win_w))


class Side:
    """The way from the logits of all windows to those of the pixels, along one side of an image.

    Upsampling to the window, averaging where windows overlap, and resizing to the original size are linear, and none
    of them mixes rows with columns: one matrix per side holds them all.

    Args:
        starts: first pixel of every window.
        window: length of a window, pixels.
        n_logits: logits along a window.
        covered: pixels that these logits cover; the last ones may lie outside of the window.
        scaled: length of the image that the windows lie in, pixels.
        size: original length, pixels.
        flipped: whether the image was mirrored along this side.

    Attributes:
        weights: (size, len(starts)·n_logits), float32, on the CPU: how much every logit counts for every pixel.
    """

    def __init__(
        self, starts: list[int], window: int, n_logits: int, covered: int, scaled: int, size: int, flipped: bool = False
    ) -> None:
        own = _resized(torch.eye(n_logits), covered)[:, :window]
        placed = torch.zeros(len(starts), n_logits, scaled)
        for part, start in zip(placed, starts, strict=True):
            part[:, start : start + window] = own
        n_windows = placed.sum((0, 1)).round()  # over every pixel: the weights of each one sum to 1
        weights = _resized(placed.flatten(0, 1) / n_windows, size)
        self.weights = (weights.flip(-1) if flipped else weights).T.contiguous()

    def part(self, pixels: slice) -> tuple[slice, Tensor]:
        """The logits that count for some pixels, and their weights: (pixels, logits)."""
        weights = self.weights[pixels]
        used = weights.any(0).nonzero()
        logits = slice(int(used[0]), int(used[-1]) + 1)
        return logits, weights[:, logits]


def _resized(x: Tensor, size: int) -> Tensor:
    """(N, old) -> (N, size), linear."""
    return F.interpolate(x.unsqueeze(0), size=size, mode="linear", align_corners=False)[0]


@dataclass(frozen=True)
class ViewLogits:
    """Logits of one view of an image, kept as coarse as the model gives them.

    Attributes:
        coarse: (R·gh, S·gw, C), float32: those of R × S windows.
        rows, columns: from their rows and columns to those of the pixels.
    """

    coarse: Tensor
    rows: Side
    columns: Side

    def part(self, rows: slice, columns: slice) -> Tensor:
        """Logits of some pixels of the original image, (h, w, C), float32."""
        device = self.coarse.device
        (tall, above), (broad, beside) = self.rows.part(rows), self.columns.part(columns)
        coarse = self.coarse[tall, broad]
        with torch.autocast(device.type, enabled=False):
            mixed = (above.to(device) @ coarse.flatten(1)).unflatten(1, coarse.shape[1:])
            return torch.bmm(beside.to(device).expand(len(mixed), -1, -1), mixed)


def sliding_logits(model: Model, image: Tensor, flipped: bool, windows: Windows, size: tuple[int, int]) -> ViewLogits:
    """Logits of one view of an image from windows, averaged where they overlap.

    Every window goes through the network once, however large the original image is. A model with `grid_logits` and
    `patch_size` (`segm.model.segmenter.Segmenter`) gives its logits per patch; of another one they are those of pixels.

    Args:
        model: images (B, 3, h, w) -> logits (B, C, h, w).
        image: (3, H, W), normalized, and mirrored if `flipped`; the logits are mirrored back. An image that does not
            cover a window is scaled up first.
        size: original (height, width).
    """
    image = upscale_to_window(image.unsqueeze(0), windows.size)
    scaled_h, scaled_w = image.shape[-2:]
    win_h, win_w = windows.size
    tops, lefts = (window_starts(*one) for one in zip(image.shape[-2:], windows.size, windows.stride, strict=True))
    grid_logits, patch_size = getattr(model, "grid_logits", model), getattr(model, "patch_size", (1, 1))
    corners = list(product(tops, lefts))
    found = []
    for first in range(0, len(corners), windows.batch_size):
        some = corners[first : first + windows.batch_size]
        crops = torch.cat([image[..., top : top + win_h, left : left + win_w] for top, left in some])
        found.append(grid_logits(crops).float())
    logits = torch.cat(found)
    gh, gw = logits.shape[-2:]
    covered_h, covered_w = whole_patches(windows.size, patch_size)
    rows = Side(tops, win_h, gh, covered_h, scaled_h, size[0])
    columns = Side(lefts, win_w, gw, covered_w, scaled_w, size[1], flipped)
    by_place = logits.unflatten(0, (len(tops), len(lefts))).permute(0, 3, 1, 4, 2)  # (R, gh, S, gw, C)
    return ViewLogits(by_place.flatten(2, 3).flatten(0, 1), rows, columns)


def predict_labels(
    model: Model, views: Sequence[tuple[Tensor, bool]], windows: Windows, size: tuple[int, int]
) -> Tensor:
    """Label map from the summed class probabilities of all views of an image.

    The pixels are done part by part, each with logits of at most `segm.model.upsample.band_bytes`.

    Args:
        model: images (B, 3, h, w) -> logits (B, C, h, w).
        views: image (3, H, W), normalized, and whether it is mirrored.
        size: original (height, width).

    Returns:
        (height, width), int64.
    """
    found = [sliding_logits(model, image, flipped, windows, size) for image, flipped in views]
    coarse = found[0].coarse
    labels = torch.empty(*size, dtype=torch.long, device=coarse.device)
    n_pixels = max(1, band_bytes(coarse.device) // (coarse.shape[-1] * coarse.element_size()))
    for rows, columns in _parts(size, n_pixels):
        parts = (view.part(rows, columns) for view in found)
        if len(found) > 1:  # of one view alone, a softmax does not change which class is largest
            parts = (logits.softmax(-1) for logits in parts)
        labels[rows, columns] = reduce(torch.Tensor.add_, parts).argmax(-1)
    return labels


def _parts(size: tuple[int, int], n_pixels: int) -> Iterator[tuple[slice, slice]]:
    """Cut an image into rectangles of at most so many pixels, as square as they can be: each needs few logits."""
    height, width = size
    w = min(width, max(isqrt(n_pixels), n_pixels // height))
    h = min(height, n_pixels // w)
    for top, left in product(range(0, height, h), range(0, width, w)):
        yield slice(top, top + h), slice(left, left + w)
