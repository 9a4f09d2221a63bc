"""A Segmenter: a ViT of one of the families, and a decoder whose blocks see the same tokens."""

from typing import Any

from torch import Tensor, nn

from patch.families.base import PatchedModel


def is_segmenter(model: nn.Module) -> bool:
    """Whether a model has the parts of a Segmenter."""
    return all(hasattr(model, name) for name in ("encoder", "decoder", "to_grid"))


class PatchedSegmenter(PatchedModel):
    """A Segmenter: a pass begins with the images and ends with what the decoder gives, for all patches."""

    guides = False

    def network(self, images: Tensor) -> Any:
        """images (B, 3, H, W) -> (B, C, gh, gw), or masks and classes of queries"""
        own: Any = super()
        with self.merging.open_pass():
            return own.network(images)

    def to_grid(self, scores: Tensor, grid: tuple[int, int]) -> Tensor:
        """Undo the merge, then put patches on the grid: (B, M, C) -> (B, C, gh, gw)"""
        own: Any = super()
        here = self.merging.current
        return own.to_grid(scores if here is None else here.unmerge(scores), grid)
