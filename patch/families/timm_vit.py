"""timm's `VisionTransformer`: ViT, DeiT (distilled too), DINOv2, SigLIP, CLIP, ..."""

from collections.abc import Iterable, Sequence
from typing import Any

from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from patch.families.base import Family, PatchedBlock, PatchedModel, check_plain, own_class
from patch.state import Pass


class PatchedTimmBlock(PatchedBlock):
    """timm's `Block`."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """x: (B, L, D) -> (B, L', D); outside of a pass, as unpatched."""
        if self.merging.current is None:
            return super().forward(x, attn_mask, is_causal)
        check_plain(attn_mask, is_causal)
        return self.go(x)

    def attend(self, x: Tensor, here: Pass, rope: Tensor | None = None) -> Tensor:
        """The half before the merge; x: (B, L, D)."""
        return x + here.drop(self.drop_path1, self.ls1(self.attention_of(self.normalized(x), here)))

    def feed(self, x: Tensor, here: Pass) -> Tensor:
        """The half after the merge; x: (B, L, D)."""
        return x + here.drop(self.drop_path2, self.ls2(self.mlp(self.norm2(x))))

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> (B, H, L, d) each"""
        attn = self.attn
        query, key, _ = attn.qkv(normed).unflatten(-1, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attn.q_norm(query), attn.k_norm(key)


class PatchedTimmEncoder(PatchedModel):
    """A ViT of timm: `forward_features` begins and ends a pass, and gives every patch its token back, unless a model
    around it does."""

    def forward_features(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **arguments: Any
    ) -> Tensor:
        """images (B, 3, H, W) -> (B, P + N, D)"""
        check_plain(attn_mask, is_causal)
        check_checkpointing(self)
        own: Any = super()
        with self.merging.encode(TimmViT().grid(self, x.shape[-2:])) as here:
            here.encoder = self
            x = own.forward_features(x, **arguments)
            return here.unmerge(x, self.blocks[-1].neighbors[0]) if here.alone else x

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
        check_plain(attn_mask, is_causal)
        check_checkpointing(self)
        own: Any = super()
        with self.merging.encode(TimmViT().grid(self, x.shape[-2:])) as here:
            here.encoder = self
            here.reads = {*feature_take_indices(len(self.blocks), indices)[0], len(self.blocks) - 1}
            return own.forward_intermediates(x, indices, *args, **arguments)


class TimmFamily(Family):
    """What all ViTs of timm share.

    Attributes:
        model_class, block_class: timm's.
    """

    model_class: type[nn.Module]
    block_class: type[nn.Module]
    encoder_front = PatchedTimmEncoder

    def knows(self, model: nn.Module) -> bool:
        return isinstance(model, self.model_class)

    def check(self, model: nn.Module) -> None:
        check_blocks(self.blocks(model), self.block_class)
        check_checkpointing(model)
        if not isinstance(model.patch_drop, nn.Identity | None):
            raise ValueError("cannot patch a model with patch dropout: its tokens do not fill the grid")

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(model.blocks)

    def prefix(self, model: nn.Module) -> int:
        return int(model.num_prefix_tokens)

    def in_front(self, model: nn.Module, index: int) -> tuple[int, bool]:
        own, end = super().in_front(model, index)
        before = len(self.blocks(model)) - getattr(model, "n_joined", 0)  # blocks before queries join, if any do
        return own + (n_queries(model) if index > before else 0), end or (n_queries(model) > 0 and index == before)

    def has_cls(self, model: nn.Module) -> bool:
        # Behind queries the CLS token is not the first one.
        return getattr(model, "cls_token", None) is not None and not n_queries(model)

    def grid(self, model: nn.Module, size: Sequence[int] | None = None) -> tuple[int, int]:
        embed: Any = model.patch_embed
        gh, gw = embed.grid_size if size is None else embed.dynamic_feat_size(tuple(size))
        return int(gh), int(gw)


class TimmViT(TimmFamily):
    """timm's plain ViTs."""

    name = "timm's VisionTransformer"
    model_class, block_class = VisionTransformer, Block
    block_front = PatchedTimmBlock

    def embed(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        return model.norm_pre(model._pos_embed(model.patch_embed(images))), [None] * len(model.blocks)


def n_queries(model: nn.Module) -> int:
    """Number of learned queries that join the tokens of the last blocks; 0: none do."""
    queries = getattr(model, "queries", None)
    return 0 if queries is None else queries.shape[1]


def check_blocks(blocks: Iterable[nn.Module], kind: type[nn.Module]) -> None:
    """Raise a ValueError unless all blocks are exactly of one class: another one may have other halves."""
    other = next((cls for cls in map(own_class, blocks) if cls is not kind), None)
    if other is not None:
        raise ValueError(f"cannot patch a {other.__name__}: only timm's {kind.__name__} is known")


def check_checkpointing(encoder: nn.Module) -> None:
    """Raise a ValueError if an encoder would run its blocks twice."""
    if getattr(encoder, "grad_checkpointing", False):
        raise ValueError("a patched model cannot run with gradient checkpointing, it would merge twice: turn that off")
