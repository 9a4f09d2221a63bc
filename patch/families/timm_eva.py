"""timm's `Eva` with rotary embeddings: EVA-02, DINOv3, PE, ViTs with RoPE."""

from collections.abc import Sequence

import torch
from timm.layers import apply_rot_embed_cat
from timm.models.eva import Eva, EvaBlock
from torch import Tensor, nn

from patch.families.base import PatchedBlock, check_plain
from patch.families.timm_vit import TimmFamily
from patch.state import Pass


class PatchedEvaBlock(PatchedBlock):
    """timm's `EvaBlock`."""

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """x: (B, L, D), rope: sine and cosine of every patch -> (B, L', D); outside of a pass, as unpatched."""
        if self.merging.current is None:
            return super().forward(x, rope, attn_mask, is_causal)
        check_plain(attn_mask, is_causal)
        return self.go(x, rope)

    def attend(self, x: Tensor, here: Pass, rope: Tensor | None = None) -> Tensor:
        """The half before the merge; x: (B, L, D)."""
        out = self.attention_of(self.normalized(x), here, here.rotary(rope))
        return x + here.drop(self.drop_path1, _scaled(self.gamma_1, out))

    def feed(self, x: Tensor, here: Pass) -> Tensor:
        """The half after the merge; x: (B, L, D)."""
        return x + here.drop(self.drop_path2, _scaled(self.gamma_2, self.mlp(self.norm2(x))))

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> (B, H, L, d) each"""
        attn = self.attn
        if attn.qkv is None:
            query, key = attn.q_proj(normed), attn.k_proj(normed)
        else:
            query, key, _ = attn.qkv(normed).chunk(3, dim=-1)
            if getattr(attn, "q_bias", None) is not None:  # beside the weight, as that of the keys, all zeros, is too
                query, key = query + attn.q_bias, key + attn.k_bias
        query, key = (x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2) for x in (query, key))
        shared = getattr(attn, "num_kv_groups", 1)  # heads that share their keys
        return attn.q_norm(query), attn.k_norm(key).repeat_interleave(shared, dim=1)

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """(B, H, L, d), but for the prefix tokens"""
        front = self.attn.num_prefix_tokens
        half = getattr(self.attn, "rotate_half", False)
        return torch.cat([x[:, :, :front], apply_rot_embed_cat(x[:, :, front:], rope, half=half)], dim=2)


def _scaled(gamma: Tensor | None, x: Tensor) -> Tensor:
    """Layer scale, where the block has it."""
    return x if gamma is None else gamma * x


class TimmEva(TimmFamily):
    """timm's ViTs with rotary embeddings."""

    name = "timm's Eva"
    model_class, block_class = Eva, EvaBlock
    block_front = PatchedEvaBlock

    def embed(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        x, rope = model._pos_embed(model.patch_embed(images))
        per_block = list(rope) if model.rope_mixed and rope is not None else [rope] * len(model.blocks)
        return model.norm_pre(x), per_block
