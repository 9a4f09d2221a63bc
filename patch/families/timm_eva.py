"""timm's `Eva` with rotary embeddings: EVA-02, DINOv3, PE, ViTs with RoPE."""

from collections.abc import Sequence

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
        return self.flow(x, rope)

    def attend(self, x: Tensor, here: Pass, rope: Tensor | None = None) -> Tensor:
        """The half before the merge; x: (B, L, D)."""
        out = self.attention(self.norm1(x), here, rope=here.rotary(rope))
        return x + here.drop(self.drop_path1, _scaled(self.gamma_1, out))

    def feed(self, x: Tensor, here: Pass) -> Tensor:
        """The half after the merge; x: (B, L, D)."""
        return x + here.drop(self.drop_path2, _scaled(self.gamma_2, self.mlp(self.norm2(x))))

    def keys(self, normed: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, d), before the rotation, which would tell where a token stands, not what it shows."""
        attn = self.attn
        if attn.qkv is None:
            keys = attn.k_proj(normed)
        else:
            keys = attn.qkv(normed).chunk(3, dim=-1)[1]
            bias = getattr(attn, "k_bias", None)  # all zeros, beside biases of queries and values
            keys = keys if bias is None else keys + bias
        return attn.k_norm(keys.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2))


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
