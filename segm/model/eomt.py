"""EoMT: the encoder is the mask transformer, since learned queries join the tokens of its last blocks."""

import math
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from segm.model.encoder import DistilledEncoder, Encoder
from segm.model.masks import Prediction
from segm.model.upsample import upsample

POWER = 0.9  # of the annealing
Guide = Callable[[int, Tensor], Tensor]


class Joined:
    """What an encoder of timm's becomes, once queries join its tokens.

    Attributes:
        queries: (1, Q, D).
        n_joined: the last so many blocks see them.
    """

    queries: nn.Parameter
    n_joined: int

    def forward_features(self: Any, x: Tensor, guide: Guide | None = None) -> Tensor:
        """images (B, 3, H, W) -> (B, Q + P + N, D), queries first.

        guide: from the number of a joined block, counted from 0, and its normalized input to the additive mask of its
            attention, (B, 1, L, L); None: all tokens see each other.
        """
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        first = len(self.blocks) - self.n_joined
        for index, block in enumerate(self.blocks):
            if index == first:
                x = torch.cat([self.queries.expand(x.shape[0], -1, -1), x], dim=1)
            guided = guide is not None and index >= first
            x = block(x, attn_mask=guide(index - first, self.norm(x))) if guided else block(x)
        return self.norm(x)


class JoinedEncoder(Joined, Encoder):
    """`Encoder` with queries."""


class JoinedDistilledEncoder(Joined, DistilledEncoder):
    """`DistilledEncoder` with queries."""


def join(encoder: nn.Module, n_queries: int, n_joined: int) -> None:
    """Let queries join the tokens of the last blocks of an encoder.

    Raises:
        ValueError: rotary embeddings, which give queries no place, or more blocks than there are.
    """
    kinds = {Encoder: JoinedEncoder, DistilledEncoder: JoinedDistilledEncoder}
    if type(encoder) not in kinds:
        raise ValueError(f"eomt takes a VisionTransformer of timm, not {type(encoder).__name__}")
    if not 1 <= n_joined <= len(encoder.blocks):
        raise ValueError(f"eomt: queries join the last {n_joined} blocks, the encoder has {len(encoder.blocks)}")
    encoder.__class__ = kinds[type(encoder)]
    encoder.queries = nn.Parameter(torch.randn(1, n_queries, encoder.embed_dim))
    encoder.n_joined = n_joined


class EoMT(nn.Module):
    """Masks and classes of queries (EoMT: Kerssies et al., 2025, arXiv 2503.19108, section 3).

    Args:
        dim: width of the encoder.
        n_cls: number of classes, K.
        patch_side: pixels; the masks have a quarter of them in both directions.
        n_queries: Q.
        n_joined: blocks in which they are among the tokens.

    Attributes:
        masked: (n_joined,), how probable it is in training that a query sees, in each of these blocks, but the
            patches of its own mask.
    """

    predicts_masks = True
    masked: Tensor

    def __init__(self, dim: int, n_cls: int, patch_side: int, n_queries: int, n_joined: int) -> None:
        super().__init__()
        self.n_queries, self.scale = n_queries, patch_side
        self.blocks = nn.ModuleList()  # they are the encoder's
        self.head = nn.Linear(dim, n_cls + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        n_steps = max(1, round(math.log2(patch_side / 4)))  # to a quarter of the image
        self.upscale = nn.Sequential(*(_doubled(dim) for _ in range(n_steps)))
        self.register_buffer("masked", torch.ones(n_joined))

    def forward(self, queries: Tensor, features: Tensor) -> Prediction:
        """queries: (B, Q, D), features: (B, D, gh, gw), behind the encoder's last norm."""
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask_head(queries), self.upscale(features))
        return Prediction(self.head(queries), masks)

    def anneal(self, progress: float) -> None:
        """Mask attention less and less, one block after the other (section 3.3).

        Args:
            progress: how much of the training is over, 0 to 1.
        """
        parts = len(self.masked) + 2
        for index in range(len(self.masked)):
            part = min(max(progress * parts - index - 1, 0.0), 1.0)
            self.masked[index] = (1 - part) ** POWER

    def mask(self, index: int, masks: Tensor, grid: tuple[int, int], n_tokens: int) -> Tensor:
        """Additive attention mask of a joined block: queries see each other, the prefix and the patches of their mask.

        Args:
            index: of the block, counted from 0.
            masks: (B, Q, h, w), logits.
            grid: (gh, gw), patches.
            n_tokens: L.

        Returns:
            (B, 1, L, L).
        """
        n_images, n_queries, n_patches = *masks.shape[:2], grid[0] * grid[1]
        free = torch.rand(n_images, n_queries, 1, device=masks.device) >= self.masked[index]
        seen = free | (upsample(masks.detach(), grid).flatten(2) > 0)
        mask = masks.new_zeros(n_images, 1, n_tokens, n_tokens)
        mask[:, 0, :n_queries, n_tokens - n_patches :].masked_fill_(~seen, float("-inf"))
        return mask


def _doubled(dim: int) -> nn.Module:
    """(B, D, h, w) -> (B, D, 2h, 2w)"""
    up, mix = nn.ConvTranspose2d(dim, dim, 2, stride=2), nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
    return nn.Sequential(up, nn.GELU(), mix, LayerNorm2d(dim))
