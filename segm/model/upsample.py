"""From logits on the patch grid to logits or labels per pixel."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# Size that the interpolated logits of one part of the image may have. On a CPU: large enough that the work dominates
# the call, small enough to stay near the cache. On a GPU, where every call is a launch: whole images, while they fit.
BAND_BYTES, GPU_BAND_BYTES = 16 * 2**20, 2**30
# Classes that are compared in a cell where no more can win.
CANDIDATES = 8


def band_bytes(device: torch.device) -> int:
    """Size that the interpolated logits of one part of the image may have on a device, bytes."""
    return BAND_BYTES if device.type == "cpu" else GPU_BAND_BYTES


def upsample(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear upsampling; logits: (B, C, gh, gw) -> (B, C, H, W)."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def whole_patches(size: Sequence[int], patch_size: tuple[int, int]) -> tuple[int, int]:
    """Pixels (height, width) that the patches of an image of this size cover."""
    height, width = (-(-side // patch) * patch for side, patch in zip(size, patch_size, strict=True))
    return height, width


def to_pixels(logits: Tensor, size: Sequence[int], patch_size: tuple[int, int]) -> Tensor:
    """Logits of every pixel of images.

    Args:
        logits: (B, C, h, w), which cover whole patches.
        size: (height, width) of the images, pixels.
        patch_size: pixels per patch, (height, width).

    Returns:
        (B, C, height, width).
    """
    height, width = size
    padded = whole_patches(size, patch_size)
    upsampled = logits if logits.shape[-2:] == padded else upsample(logits, padded)
    return upsampled[..., :height, :width]


def label_map(logits: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Class with the highest upsampled logit per pixel, without the upsampled logits of the whole image.

    Equals `upsample(logits, ...).argmax(1)`, but for ties, which rounding may turn.

    Args:
        logits: (B, C, gh, gw).
        patch_size: pixels per patch, (ph, pw).

    Returns:
        Labels, int64, (B, gh·ph, gw·pw).
    """
    if logits.device.type == "cpu":
        return _label_map_by_cells(logits, patch_size)
    return _label_map_in_bands(logits, patch_size)


def _label_map_by_cells(logits: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Interpolate where the label can change, and the classes that can win.

    The centres of four neighboring patches are the corners of a cell of ph × pw pixels, whose logits are means of
    the logits at the corners. A class that is the highest at all four is the highest in the whole cell, and a class
    wins nowhere in it whose highest corner is below the lowest corner of another.
    """
    n_images, _, gh, gw = logits.shape
    ph, pw = patch_size
    logits = logits.permute(0, 2, 3, 1).flatten(0, 2)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    corners = _cell_corners(n_images, gh, gw)
    tops = logits.argmax(-1)[corners]
    labels = tops[..., :1].repeat(1, 1, 1, ph * pw)
    mixed = (tops != tops[..., :1]).any(-1)
    weights = _corner_weights(patch_size).to(logits)
    chunk = max(1, BAND_BYTES // (4 * logits.shape[1] * logits.element_size()))
    parts = [_cell_labels(logits[rows], weights) for rows in corners[mixed].split(chunk)]
    labels[mixed] = torch.cat(parts)
    labels = labels.unflatten(-1, (ph, pw)).transpose(2, 3).reshape(n_images, (gh + 1) * ph, (gw + 1) * pw)
    top, left = ph - ph // 2, pw - pw // 2  # the outermost cells hang over the edge
    return labels[:, top : top + gh * ph, left : left + gw * pw]


def _cell_corners(n_images: int, gh: int, gw: int) -> Tensor:
    """Indices of the patches at the corners of every cell, row by row: (B, gh+1, gw+1, 4); the edge is repeated."""
    index = torch.arange(n_images * gh * gw).view(n_images, 1, gh, gw).double()
    index = F.pad(index, (1, 1, 1, 1), mode="replicate").squeeze(1).long()
    return torch.stack([index[:, :-1, :-1], index[:, :-1, 1:], index[:, 1:, :-1], index[:, 1:, 1:]], dim=-1)


def _corner_weights(patch_size: tuple[int, int]) -> Tensor:
    """(ph·pw, 4): bilinear weights of the four corners at every pixel of a cell."""
    far = [(torch.arange(side) + (0.5 if side % 2 == 0 else 0.0)) / side for side in patch_size]
    return torch.einsum("yi,xj->yxij", *(torch.stack([1 - part, part], dim=1) for part in far)).reshape(-1, 4)


def _cell_labels(corners: Tensor, weights: Tensor) -> Tensor:
    """(K, P), winning class at every pixel of cells: corners (K, 4, C), their logits; weights (P, 4) at every pixel."""
    labels = torch.empty(len(corners), len(weights), dtype=torch.long)
    few = torch.zeros(len(corners), dtype=torch.bool)
    if corners.shape[2] > CANDIDATES + 1:
        highest, bar = corners.amax(1), corners.amin(1).amax(1)
        best = highest.topk(CANDIDATES + 1, dim=1)
        few = best.values[:, -1] < bar
        candidates = best.indices[few, :-1].sort(dim=1).values  # of equal logits the first class wins, as in argmax
        chosen = corners[few].gather(2, candidates.unsqueeze(1).expand(-1, 4, -1))
        labels[few] = candidates.gather(1, (weights @ chosen).max(dim=-1).indices)
    chunk = max(1, BAND_BYTES // (weights.shape[0] * corners.shape[2] * corners.element_size()))
    rest = (~few).nonzero().squeeze(1)
    for cells in rest.split(chunk):
        labels[cells] = (weights @ corners[cells]).max(dim=-1).indices
    return labels


def _label_map_in_bands(logits: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Interpolate all classes: of as many images as fit, or in bands of patch rows, with one more row on both sides."""
    n_images, n_cls, gh, gw = logits.shape
    ph, pw = patch_size
    # Classes innermost: argmax then runs over contiguous memory, which is what the time goes into.
    logits = logits.contiguous(memory_format=torch.channels_last)
    n_rows = max(1, band_bytes(logits.device) // (n_cls * ph * gw * pw * logits.element_size()))
    rows = min(n_rows, gh)
    labels = torch.empty(n_images, gh * ph, gw * pw, dtype=torch.long, device=logits.device)
    for own, images in zip(labels.split(n_rows // rows), logits.split(n_rows // rows), strict=True):
        for top in range(0, gh, rows):
            bottom = min(top + rows, gh)
            first, last = max(top - 1, 0), min(bottom + 1, gh)
            band = upsample(images[:, :, first:last], ((last - first) * ph, gw * pw))
            own[:, top * ph : bottom * ph] = band[:, :, (top - first) * ph : (bottom - first) * ph].argmax(dim=1)
    return labels


def _bilinear_places(old: int, new: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For every point of a resized side the old points before and after it, int64, and the weight of the latter."""
    place = ((torch.arange(new, device=device) + 0.5) * (old / new) - 0.5).clamp(min=0)
    before = place.long().clamp(max=old - 1)
    return before, (before + 1).clamp(max=old - 1), place - before


def upsampled_bands(maps: Tensor, size: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
    """`upsample(maps, size)` in bands of rows, none larger than `band_bytes`.

    Args:
        maps: (C, h, w).
        size: (H, W).

    Yields:
        Which rows, and (C, rows, W), which may be written to.
    """
    height, width = size
    above, below, weight = _bilinear_places(maps.shape[1], height, maps.device)
    rows = max(1, band_bytes(maps.device) // (len(maps) * width * maps.element_size()))
    for top in range(0, height, rows):
        band = slice(top, top + rows)
        mixed = torch.lerp(maps[:, above[band]], maps[:, below[band]], weight[band, None])
        yield band, upsample(mixed.unsqueeze(0), (mixed.shape[1], width))[0]
