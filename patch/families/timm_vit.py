"""timm's `VisionTransformer`: ViT, DeiT (distilled too), DINOv2, SigLIP, CLIP, ..."""

from collections.abc import Iterable, Sequence
from typing import Any

from timm.layers import Attention
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from patch.families.base import (
    Family,
    PatchedBlock,
    PatchedModel,
    check_forward,
    check_plain,
    check_traced,
    modules_of,
    note_outside,
    own_class,
)
from patch.layout import Rows


class PatchedTimmBlock(PatchedBlock):
    """timm's `Block`."""

    ls1: Any
    ls2: Any
    mlp: Any
    norm2: Any
    drop_path1: nn.Module
    drop_path2: nn.Module

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (B, L, D) -> (B, L', D); outside of a pass, as unpatched."""
        if self._patch.merging.current is None:
            note_outside(self)
            return super().forward(x, attn_mask, is_causal)
        check_plain(attn_mask, is_causal)
        return self.run(x)

    def add_attention(self, x: Tensor, out: Tensor, layout: Rows) -> Tensor:
        return x + layout.drop(self.drop_path1, self.ls1(out))

    def feed(self, x: Tensor, layout: Rows) -> Tensor:
        return x + layout.drop(self.drop_path2, self.ls2(self.mlp(self.norm2(x))))

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self.attn
        query, key, value = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attn.q_norm(query), attn.k_norm(key), value


class PatchedTimmEncoder(PatchedModel):
    """A ViT of timm: `forward_features` starts and ends a pass, and gives every patch its token back, unless a model
    around it does."""

    blocks: Any

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **arguments: Any
    ) -> Tensor:
        """images (B, 3, H, W) -> (B, P + N, D)"""
        check_traced(x)
        check_plain(attn_mask, is_causal)
        check_checkpointing(self)
        with self._patch.merging.encoder_pass(self, self.blocks, grid_of(self, x.shape[-2:])) as track:
            x = track.release_with(super().forward_features(x, **arguments))  # type: ignore[misc]
            track.check_blocks()
            return track.after_encoder(x, self._patch.n_around[0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        *args: Any,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        **arguments: Any,
    ) -> Any:
        """timm's own, of blocks whose outputs have all patches: each the features of the token that carries it."""
        check_traced(x)
        check_plain(attn_mask, is_causal)
        check_checkpointing(self)
        n_blocks = len(self.blocks)
        with self._patch.merging.encoder_pass(self, self.blocks, grid_of(self, x.shape[-2:])) as track:
            chosen = [*indices] if isinstance(indices, Sequence) else indices
            read, highest = feature_take_indices(n_blocks, chosen)
            track.outputs_read, track.n_expected = {*read, n_blocks - 1}, highest + 1
            return track.release_with(super().forward_intermediates(x, indices, *args, **arguments))  # type: ignore[misc]


class TimmFamily(Family):
    """The common part of all ViTs of timm.

    Attributes:
        model_class, block_class: timm's.
        attention_classes: those that form one set of queries and keys, and call `scaled_dot_product_attention` once.
    """

    model_class: type[nn.Module]
    block_class: type[nn.Module]
    attention_classes: tuple[type[nn.Module], ...]
    model_mixin = PatchedTimmEncoder

    def knows(self, model: nn.Module) -> bool:
        return isinstance(model, self.model_class)

    def check(self, model: Any) -> None:
        check_kind("block", self.blocks(model), self.block_class)
        check_kind("attention", [block.attn for block in self.blocks(model)], *self.attention_classes)
        check_forward([model, *modules_of(self.blocks(model))])
        check_checkpointing(model)
        if not isinstance(model.patch_drop, nn.Identity | None):
            raise ValueError("cannot patch a model with patch dropout: its tokens do not fill the grid")

    def blocks(self, model: Any) -> Sequence[Any]:
        return list(model.blocks)

    def n_prefix(self, model: Any) -> int:
        return int(model.num_prefix_tokens)

    def n_queries(self, model: Any) -> tuple[int, int]:
        queries = getattr(model, "queries", None)
        return (0, 0) if queries is None else (queries.shape[1], len(model.blocks) - model.n_query_blocks)

    def has_cls(self, model: Any) -> bool:
        # Behind queries the CLS token is not the first one.
        return getattr(model, "cls_token", None) is not None and not self.n_queries(model)[0]

    def grid(self, model: Any, size: Sequence[int] | None = None) -> tuple[int, int]:
        return grid_of(model, size)


class TimmViT(TimmFamily):
    """timm's plain ViTs."""

    name = "timm's VisionTransformer"
    model_class, block_class, attention_classes = VisionTransformer, Block, (Attention,)
    block_mixin = PatchedTimmBlock


def grid_of(model: Any, size: Sequence[int] | None = None) -> tuple[int, int]:
    """See `Family.grid`."""
    embed = model.patch_embed
    gh, gw = embed.grid_size if size is None else embed.dynamic_feat_size(tuple(size))
    return int(gh), int(gw)


def check_kind(what: str, modules: Iterable[nn.Module], *kinds: type[nn.Module]) -> None:
    """Raise a ValueError for a module that does not run as one of some classes, whatever wrappers (FSDP2) put on top of
    the class."""
    for module in modules:
        own = own_class(module)
        if not any(issubclass(own, kind) and own.forward is kind.forward for kind in kinds):
            known = " and ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"cannot patch a model with a {own.__name__} as {what}: only timm's {known} is known")


def check_checkpointing(encoder: Any) -> None:
    """Raise a ValueError if an encoder would run its blocks twice."""
    if getattr(encoder, "grad_checkpointing", False):
        raise ValueError("a patched model cannot run with gradient checkpointing, it would merge twice: turn that off")
