"""From scores on the patch grid to scores or labels per pixel."""

import torch
import torch.nn.functional as F

# Size that the scores of one band of rows may have in `label_map`: large enough that the work per band
# dominates the call, small enough to stay near the cache.
BAND_BYTES = 16 * 2**20


def upsample(scores, size):
    """Bilinear upsampling; scores: (B, C, gh, gw) -> (B, C, H, W)."""
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False)


def label_map(scores, patch_size):
    """Class with the highest upsampled score per pixel, without the upsampled scores of the whole image.

    The image is treated in bands of patch rows. A band is interpolated together with one more row of patches
    on each side, so that the result equals `upsample(scores, ...).argmax(1)`.

    Args:
        scores: (B, C, gh, gw).
        patch_size: pixels per patch, (ph, pw).

    Returns:
        Labels, int64, (B, gh·ph, gw·pw).
    """
    n_images, n_cls, gh, gw = scores.shape
    ph, pw = patch_size
    # Classes innermost: argmax then runs over contiguous memory, which is what the time goes into.
    scores = scores.contiguous(memory_format=torch.channels_last)
    row_bytes = n_cls * ph * gw * pw * scores.element_size()
    rows = max(1, min(BAND_BYTES // row_bytes, (gh + 1) // 2))
    labels = torch.empty(n_images, gh * ph, gw * pw, dtype=torch.long, device=scores.device)
    for image in range(n_images):
        for top in range(0, gh, rows):
            bottom = min(top + rows, gh)
            first, last = max(top - 1, 0), min(bottom + 1, gh)
            band = upsample(scores[image : image + 1, :, first:last], ((last - first) * ph, gw * pw))
            band = band[0, :, (top - first) * ph : (bottom - first) * ph]
            labels[image, top * ph : bottom * ph] = band.argmax(dim=0)
    return labels


def resized_label_map(logits, size):
    """`upsample(logits, size).argmax(1)` for any size, in bands of rows; ties aside, which rounding may turn.

    Args:
        logits: (C, h, w).
        size: (H, W).

    Returns:
        (H, W), int64.
    """
    n_cls, old = logits.shape[:2]
    height, width = size
    # Bilinear sampling without aligned corners: row y of the result lies at (y + 0.5)·h/H - 0.5 of the logits.
    place = ((torch.arange(height, device=logits.device) + 0.5) * (old / height) - 0.5).clamp(min=0)
    above = place.long().clamp(max=old - 1)
    below = (above + 1).clamp(max=old - 1)
    weight = (place - above)[:, None]
    rows = max(1, BAND_BYTES // (n_cls * width * logits.element_size()))
    labels = torch.empty(height, width, dtype=torch.long, device=logits.device)
    for top in range(0, height, rows):
        band = slice(top, top + rows)
        mixed = torch.lerp(logits[:, above[band]], logits[:, below[band]], weight[band])
        labels[band] = upsample(mixed.unsqueeze(0), (mixed.shape[1], width))[0].argmax(0)
    return labels
