"""mmsegmentation's `VisionTransformer`, alone or in an `EncoderDecoder`: recognized by name, never imported."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from patch.families.base import OpenBlock, OpenFamily, Patched, own_class, put_in_front
from patch.state import Merging, Pass

MODULE, MODEL, BLOCK = "mmseg.models.backbones.vit", "VisionTransformer", "TransformerEncoderLayer"


class PatchedEncoderLayer(OpenBlock):
    """mmsegmentation's `TransformerEncoderLayer`, whose attention is PyTorch's `MultiheadAttention`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L', D); outside of a pass, as unpatched."""
        if self.merging.current is None:
            return super().forward(x)
        if self.with_cp and x.requires_grad:
            raise ValueError("a patched model cannot run with checkpoints, it would merge twice: set with_cp=False")
        return self.go(x)

    @property
    def attention_is_fused(self) -> bool:
        """It gives its weights back, so it is explicit."""
        return False

    @property
    def attention_scale(self) -> float:
        return self.attn.attn.head_dim**-0.5

    @property
    def attention_dropout(self) -> float:
        return self.attn.attn.dropout

    def run_attention(self, normed: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        bias = None if mask is None else mask.flatten(1)  # PyTorch takes a bias of the keys as their padding mask
        return self.attn(normed, identity=normed.new_zeros(()), key_padding_mask=bias)

    def attend(self, x: Tensor, here: Pass, rope: Tensor | None = None) -> Tensor:
        """The half before the merge; x: (B, L, D)."""
        return x + self.attention_of(self.normalized(x), here)

    def feed(self, x: Tensor, here: Pass) -> Tensor:
        """The half after the merge; x: (B, L, D)."""
        return self.ffn(self.norm2(x), identity=x)

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> (B, H, L, d) each"""
        attn = self.attn.attn
        query, key, _ = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        query, key = (x.unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for x in (query, key))
        return query, key


class PatchedPatchEmbed(Patched):
    """mmsegmentation's `PatchEmbed`, with which a pass begins: it knows the grid."""

    ATTRIBUTES = ("merging",)

    merging: Merging

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """(B, 3, H, W) -> ((B, N, D), grid)"""
        tokens, grid = super().forward(x)
        self.merging.begin((int(grid[0]), int(grid[1])))
        return tokens, grid


class MMSegViT(OpenFamily):
    """mmsegmentation's plain ViT."""

    name = "mmsegmentation's VisionTransformer"
    block_front = PatchedEncoderLayer

    def knows(self, model: nn.Module) -> bool:
        return any((cls.__module__, cls.__name__) == (MODULE, MODEL) for cls in type(model).__mro__)

    def check(self, model: nn.Module) -> None:
        other = next((cls for cls in map(own_class, self.blocks(model)) if cls.__name__ != BLOCK), None)
        if other is not None:
            raise ValueError(f"cannot patch a {other.__name__}: only mmsegmentation's {BLOCK} is known")

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(model.layers)

    def prefix(self, model: nn.Module) -> int:
        return int(model.with_cls_token)

    def has_cls(self, model: nn.Module) -> bool:
        return bool(model.with_cls_token)

    def grid(self, model: nn.Module, size: Sequence[int] | None = None) -> tuple[int, int]:
        gh, gw = (-(-side // model.patch_size) for side in (size or model.img_size))
        return gh, gw

    def shown(self, model: nn.Module, index: int) -> bool:
        return index - 1 in model.out_indices

    def begin(self, model: nn.Module, merging: Merging) -> None:
        embed: Any = model.patch_embed
        put_in_front(embed, PatchedPatchEmbed, merging=merging)
