"""Decoders that read blocks of the encoder as maps on the patch grid."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class GridDecoder(Protocol):
    """What a Segmenter needs to know of such a decoder.

    Attributes:
        reads: 0-based indices of the blocks whose outputs it is given, before the encoder's last norm.
        scale: rows and columns of its logits per patch.
        neck: from the maps of these blocks to what it takes, and its auxiliary heads.
    """

    reads: Sequence[int]
    scale: int
    neck: nn.Module

    def __call__(self, maps: Sequence[Tensor]) -> Tensor: ...


class LinearBN(nn.Module):
    """BatchNorm and a 1×1 convolution on the last blocks, concatenated: what DINOv2 and DINOv3 are scored with
    (Oquab et al., 2023, section 7.4).

    Args:
        dim: width of the encoder.
        n_cls: number of classes.
        depth: blocks of the encoder.
        n_blocks: the last so many are read.
    """

    scale = 1

    def __init__(self, dim: int, n_cls: int, depth: int, n_blocks: int = 1) -> None:
        super().__init__()
        if not 1 <= n_blocks <= depth:
            raise ValueError(f"linear_bn reads the last {n_blocks} blocks, the encoder has {depth}")
        self.reads = list(range(depth - n_blocks, depth))
        self.neck = nn.Identity()
        self.blocks = nn.ModuleList()  # no attention: nothing to patch, nothing to show
        self.bn = nn.BatchNorm2d(n_blocks * dim)
        self.head = nn.Conv2d(n_blocks * dim, n_cls, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: (B, D, gh, gw) each -> logits (B, n_cls, gh, gw)."""
        return self.head(self.bn(torch.cat([*maps], dim=1)))
