"""timm's `VisionTransformer`: ViT, DeiT (distilled too), DINOv2, SigLIP, CLIP, ..."""

from collections.abc import Sequence
from typing import Any

from timm.layers import PatchDropout
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from patch.families.base import Family, Patched, PatchedBlock, check_plain, own_class
from patch.state import Merging, Pass


class PatchedTimmBlock(PatchedBlock):
    """timm's `Block`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (B, L, D) -> (B, L', D); outside of a pass, as unpatched."""
        if self.merging.current is None:
            return super().forward(x, attn_mask, is_causal)
        check_plain(attn_mask, is_causal)
        return self.flow(x)

    def attend(self, x: Tensor, here: Pass, rope: Tensor | None = None) -> Tensor:
        """The half before the merge; x: (B, L, D)."""
        return x + here.drop(self.drop_path1, self.ls1(self.attention(self.norm1(x), here)))

    def feed(self, x: Tensor, here: Pass) -> Tensor:
        """The half after the merge; x: (B, L, D)."""
        return x + here.drop(self.drop_path2, self.ls2(self.mlp(self.norm2(x))))

    def keys(self, normed: Tensor) -> Tensor:
        """(B, L, D) -> (B, H, L, d)"""
        attn = self.attn
        return attn.k_norm(attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1))[:, :, 1].transpose(1, 2))


class PatchedTimmEncoder(Patched):
    """A ViT of timm: `forward_features` begins and ends a pass, and gives every patch its token back, unless a model
    around it does."""

    ATTRIBUTES = ("merging",)

    merging: Merging

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **arguments: Any
    ) -> Tensor:
        """images (B, 3, H, W) -> (B, P + N, D)"""
        check_plain(attn_mask, is_causal)
        check_checkpointing(self)
        with self.merging.encode(patch_grid(self, x.shape[-2:])) as here:
            x = super().forward_features(x, **arguments)
            return here.unmerge(x, self.merging.prefix) if here.alone else x

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """timm would put the merged tokens on the grid as if they were all patches."""
        raise ValueError(
            "a patched ViT cannot give intermediate features on the grid: use forward_features, or patch.remove first"
        )

    get_intermediate_layers = forward_intermediates


class TimmViT(Family):
    """timm's plain ViTs."""

    name = "timm's VisionTransformer"
    block_front = PatchedTimmBlock
    encoder_front = PatchedTimmEncoder

    @staticmethod
    def knows(model: nn.Module) -> bool:
        """Whether it is one, a subclass included."""
        return isinstance(model, VisionTransformer)

    @staticmethod
    def check(model: nn.Module) -> None:
        """Raise a ValueError for other blocks than `Block`, patch dropout or gradient checkpointing."""
        check_blocks(model.blocks, Block)
        check_checkpointing(model)
        if isinstance(model.patch_drop, PatchDropout):
            raise ValueError("cannot patch a model with patch dropout: its tokens do not fill the grid")

    @staticmethod
    def blocks(model: nn.Module) -> Sequence[nn.Module]:
        """Its blocks."""
        return list(model.blocks)

    @staticmethod
    def prefix(model: nn.Module) -> int:
        """CLS, distillation and register tokens."""
        return model.num_prefix_tokens

    @staticmethod
    def embed(model: nn.Module, images: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        """images (B, 3, H, W) -> tokens (B, P + N, D)"""
        return model.norm_pre(model._pos_embed(model.patch_embed(images))), [None] * len(model.blocks)

    @staticmethod
    def grid(model: nn.Module, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(gh, gw)"""
        return patch_grid(model, size)


def patch_grid(model: nn.Module, size: Sequence[int] | None) -> tuple[int, int]:
    """(gh, gw), patches that timm's patch embedding makes of (height, width) pixels."""
    embed = model.patch_embed
    gh, gw = embed.grid_size if size is None else embed.dynamic_feat_size(tuple(size))
    return int(gh), int(gw)


def check_blocks(blocks: Sequence[nn.Module], kind: type[nn.Module]) -> None:
    """Raise a ValueError unless all blocks are exactly of one class: another one may have other halves."""
    other = next((cls for cls in map(own_class, blocks) if cls is not kind), None)
    if other is not None:
        raise ValueError(f"cannot patch a {other.__name__}: only timm's {kind.__name__} is known")


def check_checkpointing(encoder: nn.Module) -> None:
    """Raise a ValueError if an encoder would run its blocks twice."""
    if getattr(encoder, "grad_checkpointing", False):
        raise ValueError("a patched model cannot run with gradient checkpointing, it would merge twice: turn that off")
