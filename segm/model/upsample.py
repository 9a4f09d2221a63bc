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
    row_bytes = n_images * n_cls * ph * gw * pw * scores.element_size()
    rows = max(1, BAND_BYTES // row_bytes)
    labels = torch.empty(n_images, gh * ph, gw * pw, dtype=torch.long, device=scores.device)
    for top in range(0, gh, rows):
        bottom = min(top + rows, gh)
        first, last = max(top - 1, 0), min(bottom + 1, gh)
        band = upsample(scores[:, :, first:last], ((last - first) * ph, gw * pw))
        band = band[:, :, (top - first) * ph : (bottom - first) * ph]
        labels[:, top * ph : bottom * ph] = band.argmax(dim=1)
    return labels
