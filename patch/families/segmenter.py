"""A Segmenter: a ViT of one of the families, and a decoder whose blocks see the same tokens."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from patch.families.base import RECORD, PatchedModel


def is_segmenter(model: nn.Module) -> bool:
    """Return whether a model has the parts of a Segmenter; not a wrapper that passes them on (`torch.compile`)."""
    return model._modules.keys() >= {"encoder", "decoder"} and hasattr(model, "to_grid")


class PatchedSegmenter(PatchedModel):
    """A Segmenter: a pass begins with the images and ends with what the decoder gives, for all patches."""

    mask_attention = False
    encoder: Any
    decoder: Any

    def network(self, images: Tensor) -> Any:
        """images (B, 3, H, W) -> (B, C, gh, gw), or masks and classes of queries"""
        if RECORD not in vars(self.encoder):  # it was taken out by itself
            return super().network(images)  # type: ignore[misc]
        with self._patch.merging.start_pass(self.encoder, self.encoder.blocks, self.decoder.blocks):
            return super().network(images)  # type: ignore[misc]

    def to_grid(self, scores: Tensor, grid: tuple[int, int]) -> Tensor:
        """Undo the merge, then put patches on the grid: (B, M, C) -> (B, C, gh, gw); or enlarge a smaller grid."""
        track = self._patch.merging.current
        if track is None or track.grid_left is None:
            return super().to_grid(scores if track is None else track.unmerge(scores), grid)  # type: ignore[misc]
        return F.interpolate(super().to_grid(scores, track.grid_left), grid, mode="bilinear")  # type: ignore[misc]
