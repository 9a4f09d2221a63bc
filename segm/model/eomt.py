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


class QueryEncoder:
    """An encoder of timm's whose last blocks also see learned queries; mixed into its class by `add_queries`.

    Attributes:
        queries: (1, Q, D).
        n_query_blocks: number of blocks, the last ones, that see them.
    """

    queries: nn.Parameter
    n_query_blocks: int

    def forward_features(self: Any, x: Tensor, mask_of: Callable[[int, Tensor], Tensor] | None = None) -> Tensor:
        """images (B, 3, H, W) -> (B, Q + P + N, D), queries first.

        mask_of: from the number of a block with queries, counted from 0, and its normalized input to the additive mask
            of its attention, (B, 1, L, L); None: all tokens see each other.
        """
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        first = len(self.blocks) - self.n_query_blocks
        for index, block in enumerate(self.blocks):
            if index == first:
                x = torch.cat([self.queries.expand(x.shape[0], -1, -1), x], dim=1)
            masked = mask_of is not None and index >= first
            x = block(x, attn_mask=mask_of(index - first, self.norm(x))) if masked else block(x)
        return self.norm(x)


class EncoderWithQueries(QueryEncoder, Encoder):
    """`Encoder` with queries."""


class DistilledEncoderWithQueries(QueryEncoder, DistilledEncoder):
    """`DistilledEncoder` with queries."""


def add_queries(encoder: nn.Module, n_queries: int, n_query_blocks: int) -> None:
    """Let queries join the tokens of the last blocks of an encoder.

    Raises:
        ValueError: rotary embeddings, which give queries no place, or more blocks than there are.
    """
    kinds = {Encoder: EncoderWithQueries, DistilledEncoder: DistilledEncoderWithQueries}
    if type(encoder) not in kinds:
        raise ValueError(f"eomt takes a VisionTransformer of timm, not {type(encoder).__name__}")
    if not 1 <= n_query_blocks <= len(encoder.blocks):
        raise ValueError(f"eomt: queries join the last {n_query_blocks} blocks, the encoder has {len(encoder.blocks)}")
    encoder.__class__ = kinds[type(encoder)]
    encoder.queries = nn.Parameter(torch.randn(1, n_queries, encoder.embed_dim))
    encoder.n_query_blocks = n_query_blocks


class ScaleBlock(nn.Sequential):
    """(B, D, h, w) -> (B, D, 2h, 2w)"""

    def __init__(self, dim: int) -> None:
        up, mix = nn.ConvTranspose2d(dim, dim, 2, stride=2), nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        super().__init__(up, nn.GELU(), mix, LayerNorm2d(dim))


class EoMT(nn.Module):
    """Masks and classes of queries (EoMT: Kerssies et al., 2025, arXiv 2503.19108, section 3).

    Args:
        dim: width of the encoder.
        n_cls: number of classes, K.
        patch_side: pixels; the masks have a quarter of them in both directions.
        n_queries: Q.
        n_query_blocks: blocks in which they are among the tokens.

    Attributes:
        mask_probs: (n_query_blocks,), probability in training that a query of this block sees only the patches of its
            own mask.
    """

    predicts_masks = True
    mask_probs: Tensor

    def __init__(self, dim: int, n_cls: int, patch_side: int, n_queries: int, n_query_blocks: int) -> None:
        super().__init__()
        self.n_queries, self.scale = n_queries, patch_side
        self.blocks = nn.ModuleList()  # they are the encoder's
        self.head = nn.Linear(dim, n_cls + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        )
        n_steps = max(1, round(math.log2(patch_side / 4)))  # to a quarter of the image
        self.upscale = nn.Sequential(*(ScaleBlock(dim) for _ in range(n_steps)))
        self.register_buffer("mask_probs", torch.ones(n_query_blocks))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "masked" in state_dict:  # its name in older checkpoints
            state_dict[prefix + "mask_probs"] = state_dict.pop(prefix + "masked")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, queries: Tensor, features: Tensor) -> Prediction:
        """queries: (B, Q, D), features: (B, D, gh, gw), behind the encoder's last norm."""
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask_head(queries), self.upscale(features))
        return Prediction(self.head(queries), masks)

    def anneal(self, progress: float) -> None:
        """Mask attention less and less, one block after the other (section 3.3); what is unmasked stays so.

        Args:
            progress: how much of the training is over, 0 to 1.
        """
        parts = len(self.mask_probs) + 2
        done = [min(max(progress * parts - index - 1, 0.0), 1.0) for index in range(len(self.mask_probs))]
        self.mask_probs.clamp_(max=self.mask_probs.new_tensor([(1 - part) ** POWER for part in done]))

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
        free = torch.rand(n_images, n_queries, 1, device=masks.device) >= self.mask_probs[index]
        seen = free | (upsample(masks.detach(), grid).flatten(2) > 0)
        mask = masks.new_zeros(n_images, 1, n_tokens, n_tokens)
        mask[:, 0, :n_queries, n_tokens - n_patches :].masked_fill_(~seen, float("-inf"))
        return mask
