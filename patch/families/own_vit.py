"""A module of one's own that runs timm's blocks: its patches are embedded by timm's `PatchEmbed`."""

from collections.abc import Sequence
from typing import Any

from timm.layers import Attention, PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from patch.families.base import (
    OpenBlock,
    OpenFamily,
    PatchedEmbedding,
    PatchedModel,
    check_forward,
    check_traced,
    modules_of,
)
from patch.families.timm_vit import PatchedTimmBlock, check_kind, grid_of

PREFIXES = "cls_token", "dist_token", "reg_token"


class PatchedOwnBlock(PatchedTimmBlock, OpenBlock):
    """timm's `Block`, of which the last one gives every patch its token back."""


class PatchedPatchEmbed(PatchedEmbedding):
    """timm's `PatchEmbed`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, N, D)"""
        self.tell_grid(super().dynamic_feat_size(tuple(x.shape[-2:])))  # type: ignore[misc]
        return super().forward(x)


class PatchedOwnViT(PatchedModel):
    """A module of one's own: its call starts and ends a pass."""

    blocks: Any

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As unpatched; behind the last block all patches come back."""
        check_traced(x)
        with self._patch.merging.start_pass(self, [*self.blocks]) as track:
            return track.release_with(super().forward(x, *args, **kwargs))


class OwnViT(OpenFamily):
    """A module that holds timm's blocks as `blocks`, a `PatchEmbed` as `patch_embed`, and prefix tokens as `cls_token`,
    `dist_token` and `reg_token`, or their number as `num_prefix_tokens`."""

    name = "a module with blocks and patch_embed of timm's"
    block_mixin = PatchedOwnBlock
    model_mixin = PatchedOwnViT

    def knows(self, model: nn.Module) -> bool:
        return has_blocks(model) and isinstance(getattr(model, "patch_embed", None), PatchEmbed)

    def check(self, model: Any) -> None:
        check_kind("block", model.blocks, Block)
        check_kind("attention", [block.attn for block in model.blocks], Attention)
        check_kind("patch embedding", [model.patch_embed], PatchEmbed)
        check_forward([model, model.patch_embed, *modules_of(model.blocks)])

    def blocks(self, model: Any) -> Sequence[Any]:
        return list(model.blocks)

    def n_prefix(self, model: Any) -> int:
        given = getattr(model, "num_prefix_tokens", None)
        if given is not None:
            return int(given)
        tokens = (getattr(model, name, None) for name in PREFIXES)
        return sum(int(token.shape[-2]) for token in tokens if isinstance(token, Tensor))

    def has_cls(self, model: Any) -> bool:
        return isinstance(getattr(model, "cls_token", None), Tensor)

    def grid(self, model: Any, size: Sequence[int] | None = None) -> tuple[int, int]:
        return grid_of(model, size)

    def embedding(self, model: Any) -> tuple[nn.Module, type[PatchedEmbedding], Any]:
        return model.patch_embed, PatchedPatchEmbed, None


def has_blocks(model: nn.Module) -> bool:
    """Return whether a module holds timm's blocks as `blocks`."""
    blocks = dict(model.named_children()).get("blocks")  # a wrapper would lend those of the model that it holds
    return isinstance(blocks, nn.ModuleList | nn.Sequential) and len(blocks) > 0 and isinstance(blocks[0], Block)
