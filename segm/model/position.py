"""Learned position embeddings: whose they are, and other grids."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize_position_embedding(
    embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], prefix: int
) -> Tensor:
    """Resize a learned position embedding bilinearly (without antialiasing), as the released models do.

    Args:
        embedding: (1, prefix + gh·gw, D).
        grid, new_grid: patches per side (gh, gw), before and after.
        prefix: embeddings in front that belong to prefix tokens and stay as they are.

    Returns:
        (1, prefix + new_gh·new_gw, D).
    """
    if tuple(grid) == tuple(new_grid):
        return embedding
    front, patches = embedding[:, :prefix], embedding[:, prefix:]
    patches = patches.unflatten(1, tuple(grid)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=tuple(new_grid), mode="bilinear", align_corners=False)
    return torch.cat([front, patches.flatten(2).transpose(1, 2)], dim=1)


def position_prefix(encoder: nn.Module) -> int:
    """Number of prefix tokens that have a position embedding of their own."""
    return 0 if encoder.no_embed_class else encoder.num_prefix_tokens
