"""timm's `Eva` with rotary embeddings: EVA-02, DINOv3, PE, ViTs with RoPE."""

from typing import Any

import torch
from timm.layers import AttentionRope, RotaryEmbeddingCat, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from patch.families.base import PatchedBlock, check_plain, note_outside
from patch.families.timm_vit import TimmFamily
from patch.layout import Rows


class PatchedEvaBlock(PatchedBlock):
    """timm's `EvaBlock`."""

    gamma_1: Tensor | None
    gamma_2: Tensor | None
    mlp: Any
    norm2: Any
    drop_path1: nn.Module
    drop_path2: nn.Module

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """x: (B, L, D), rope: sine and cosine of every patch -> (B, L', D); outside of a pass, as unpatched."""
        if self._patch.merging.current is None:
            note_outside(self)
            return super().forward(x, rope, attn_mask, is_causal)
        check_plain(attn_mask, is_causal)
        return self.run(x, rope)

    def add_attention(self, x: Tensor, out: Tensor, layout: Rows) -> Tensor:
        return x + layout.drop(self.drop_path1, _scaled(self.gamma_1, out))

    def feed(self, x: Tensor, layout: Rows) -> Tensor:
        return x + layout.drop(self.drop_path2, _scaled(self.gamma_2, self.mlp(self.norm2(x))))

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.attn
        if attn.qkv is None:
            projected = attn.q_proj(normed), attn.k_proj(normed), attn.v_proj(normed)
        else:
            projected = attn.qkv(normed).chunk(3, dim=-1)
            if getattr(attn, "q_bias", None) is not None:  # beside the weight, as that of the keys, all zeros, is too
                biases = attn.q_bias, attn.k_bias, attn.v_bias
                projected = tuple(x + bias for x, bias in zip(projected, biases, strict=True))
        query, key, value = (x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for x in projected)
        shared = getattr(attn, "num_kv_groups", 1)  # heads that share their keys and values
        return attn.q_norm(query), *(x.repeat_interleave(shared, dim=1) for x in (attn.k_norm(key), value))

    def rotate(self, x: Tensor, rotary: Tensor) -> Tensor:
        n_prefix = self.attn.num_prefix_tokens
        half = getattr(self.attn, "rotate_half", False)
        return torch.cat([x[:, :, :n_prefix], apply_rot_embed_cat(x[:, :, n_prefix:], rotary, half=half)], dim=2)


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    """Layer scale, where the block has it."""
    return x if gamma is None else gamma * x


class TimmEva(TimmFamily):
    """timm's ViTs with rotary embeddings."""

    name = "timm's Eva"
    model_class, block_class, attention_classes = Eva, EvaBlock, (EvaAttention, AttentionRope)
    block_mixin = PatchedEvaBlock

    def rotary_table(self, model: Any, grid: tuple[int, int]) -> Tensor:
        rope = model.rope
        if isinstance(rope, RotaryEmbeddingCat):  # whose `get_embed` may know its own grid alone
            bands: Any = rope.bands
            return torch.cat(rope._build_embed(list(grid), bands), -1)
        return rope.get_embed(shape=list(grid))
