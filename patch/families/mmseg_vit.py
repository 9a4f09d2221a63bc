"""mmsegmentation's `VisionTransformer`, alone or in an `EncoderDecoder`: recognized by name, never imported."""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from patch.attention import AttentionMask
from patch.families.base import (
    OpenBlock,
    OpenFamily,
    PatchedEmbedding,
    PatchedModel,
    check_forward,
    modules_of,
    note_outside,
    own_class,
)
from patch.layout import Rows

MODULE, MODEL, BLOCK = "mmseg.models.backbones.vit", "VisionTransformer", "TransformerEncoderLayer"


class PatchedEncoderLayer(OpenBlock):
    """mmsegmentation's `TransformerEncoderLayer`, whose attention is PyTorch's `MultiheadAttention`."""

    ffn: Any
    norm2: Any
    with_cp: bool

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L', D); outside of a pass, as unpatched."""
        if self._patch.merging.current is None:
            note_outside(self)
            return super().forward(x)
        if self.with_cp and x.requires_grad:
            raise ValueError("a patched model cannot run with checkpoints, it would merge twice: set with_cp=False")
        return self.run(x)

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

    def run_attention(self, normed: Tensor, mask: AttentionMask | Tensor | None, rotary: Tensor | None) -> Tensor:
        assert not isinstance(mask, AttentionMask)
        bias = None if mask is None else mask.flatten(1)  # PyTorch takes a bias of the keys as their padding mask
        return self.attn(normed, identity=normed.new_zeros(()), key_padding_mask=bias)

    def add_attention(self, x: Tensor, out: Tensor, layout: Rows) -> Tensor:
        return x + out

    def feed(self, x: Tensor, layout: Rows) -> Tensor:
        return self.ffn(self.norm2(x), identity=x)

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.attn.attn
        if not isinstance(attn, nn.MultiheadAttention):  # peft's, for one, adds to the weights while it runs
            raise ValueError(
                f"a {type(attn).__name__} of another library hides the keys that tokens merge by: call "
                "merge_and_unload first, or take a method that goes by tokens alone, such as graph"
            )
        qkv = F.linear(normed, attn.in_proj_weight, attn.in_proj_bias)
        query, key, value = qkv.unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return query, key, value


class PatchedPatchEmbed(PatchedEmbedding):
    """mmsegmentation's `PatchEmbed`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """(B, 3, H, W) -> ((B, N, D), grid)"""
        tokens, grid = super().forward(x)
        self.tell_grid(grid)
        return tokens, grid


class PatchedMMSegViT(PatchedModel):
    """mmsegmentation's ViT: its call starts and ends a pass."""

    layers: Any
    out_indices: Sequence[int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As unpatched, from blocks whose outputs have all patches."""
        with self._patch.merging.start_pass(self, self.layers) as track:
            track.outputs_read = self.out_indices
            return track.release_with(super().forward(*args, **kwargs))


class MMSegViT(OpenFamily):
    """mmsegmentation's plain ViT."""

    name = "mmsegmentation's VisionTransformer"
    block_mixin = PatchedEncoderLayer
    model_mixin = PatchedMMSegViT

    def knows(self, model: nn.Module) -> bool:
        return any((cls.__module__, cls.__name__) == (MODULE, MODEL) for cls in type(model).__mro__)

    def check(self, model: Any) -> None:
        classes = [own_class(block) for block in self.blocks(model)]
        other = next((cls for cls in classes if BLOCK not in [base.__name__ for base in cls.__mro__]), None)
        if other is not None:
            raise ValueError(f"cannot patch a {other.__name__}: only mmsegmentation's {BLOCK} is known")
        check_forward([model, model.patch_embed, *modules_of(self.blocks(model))])

    def blocks(self, model: Any) -> Sequence[Any]:
        return list(model.layers)

    def n_prefix(self, model: Any) -> int:
        return int(model.with_cls_token)

    def has_cls(self, model: Any) -> bool:
        return bool(model.with_cls_token)

    def grid(self, model: Any, size: Sequence[int] | None = None) -> tuple[int, int]:
        gh, gw = (-(-side // model.patch_size) for side in (size or model.img_size))
        return gh, gw

    def embedding(self, model: Any) -> tuple[nn.Module, type[PatchedEmbedding], Any]:
        return model.patch_embed, PatchedPatchEmbed, None
