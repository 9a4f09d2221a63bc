"""The encoder: timm's plain ViTs, with the position embedding of the released Segmenter, and queries where asked for.

The rest is timm's.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segm.config import load_config
from segm.errors import one_line

# The backbones of the released checkpoints. They were trained with PyTorch's LayerNorm default (eps 1e-5),
# not with timm's 1e-6; every other timm name keeps timm's value.
RELEASED = tuple(load_config("backbones"))
# Released names that timm does not know, and the timm model whose definition and weights they use.
ALIASES = {"vit_base_patch8_384": "vit_base_patch8_224"}


def resize_position_embedding(
    embedding: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], prefix: int
) -> Tensor:
    """Resize a learned position embedding bilinearly (without antialiasing), as the released models do.

    Args:
        embedding: (1, prefix + gh·gw, D) -> (1, prefix + new_gh·new_gw, D).
        grid, new_grid: patches per side (gh, gw), before and after.
        prefix: number of embeddings in front, of prefix tokens, which stay as they are.
    """
    if tuple(grid) == tuple(new_grid):
        return embedding
    front, patches = embedding[:, :prefix], embedding[:, prefix:]
    patches = patches.unflatten(1, tuple(grid)).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=tuple(new_grid), mode="bilinear", align_corners=False)
    return torch.cat([front, patches.flatten(2).transpose(1, 2)], dim=1)


def position_prefix(encoder: nn.Module) -> int:
    """Number of prefix tokens that have a position embedding of their own."""
    return 0 if encoder.no_embed_class else encoder.num_prefix_tokens


def _pos_embed(self: VisionTransformer, x: Tensor) -> Tensor:
    """Add prefix tokens and position embedding; x: (B, gh, gw, D) -> (B, P + gh·gw, D).

    timm's own resizes the embedding bicubically, with antialiasing.
    """
    tokens = (self.cls_token, getattr(self, "dist_token", None), self.reg_token)
    prefix = [token.expand(x.shape[0], -1, -1) for token in tokens if token is not None]
    grid, x = x.shape[1:3], x.flatten(1, 2)
    if self.pos_embed is None:
        return self.pos_drop(torch.cat([*prefix, x], dim=1))
    embedded_prefix = position_prefix(self)
    position = resize_position_embedding(self.pos_embed, self.patch_embed.grid_size, grid, embedded_prefix)
    if embedded_prefix == 0:
        return self.pos_drop(torch.cat([*prefix, x + position], dim=1))
    return self.pos_drop(torch.cat([*prefix, x], dim=1) + position)


class Encoder(VisionTransformer):
    """timm's VisionTransformer for any image size."""

    _pos_embed = _pos_embed


class DistilledEncoder(VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (DeiT) for any image size."""

    _pos_embed = _pos_embed


# Rotary models keep timm's own position embedding.
_ENCODERS = {VisionTransformer: Encoder, VisionTransformerDistilled: DistilledEncoder, Eva: Eva}


def create_encoder(net_kwargs: Mapping[str, Any]) -> VisionTransformer | Eva:
    """Build the encoder of a Segmenter, with random weights.

    Args:
        net_kwargs: `backbone` (a timm name), and optionally `image_size`, `patch_size`, `d_model`, `n_heads`,
            `n_layers`, `bands`, `dropout`, `drop_path_rate`, `distilled`; they override the values of the name.

    Raises:
        ValueError: unknown or unsupported backbone.
    """
    backbone = net_kwargs["backbone"]
    encoder = _create(backbone, **_overrides(net_kwargs))
    if net_kwargs.get("distilled") and not isinstance(encoder, DistilledEncoder):
        raise ValueError(f"backbone {backbone} has no distillation token: set distilled to false")
    # DistributedDataParallel waits for every parameter that wants a gradient, and features use no classifier or
    # pooling. The 1000-class head itself stays, since released checkpoints have it.
    for name in ("head", "head_dist", "fc_norm", "attn_pool"):
        module = getattr(encoder, name, None)
        if module is not None:
            module.requires_grad_(False)
    return encoder


def _overrides(net_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture that net_kwargs describe, in timm's words."""
    names = {"patch_size": "patch_size", "d_model": "embed_dim", "n_layers": "depth", "n_heads": "num_heads"}
    overrides = {timm_name: net_kwargs[name] for name, timm_name in names.items() if net_kwargs.get(name)}
    if net_kwargs.get("bands"):
        overrides["in_chans"] = len(net_kwargs["bands"])
    size = net_kwargs.get("image_size")
    if size:
        overrides["img_size"] = (size, size) if isinstance(size, int) else tuple(size)
    dropout = net_kwargs.get("dropout") or 0.0
    overrides |= {f"{kind}_drop_rate": dropout for kind in ("pos", "proj", "attn")}
    return overrides | {"drop_path_rate": net_kwargs.get("drop_path_rate") or 0.0}


def _create(backbone: str, **overrides: Any) -> VisionTransformer | Eva:
    if backbone in RELEASED:
        overrides["norm_layer"] = partial(nn.LayerNorm, eps=1e-5)
        if backbone in ALIASES:
            overrides.setdefault("img_size", (384, 384))
    name = ALIASES.get(backbone, backbone)
    if not timm.is_model(name):
        raise ValueError(f"unknown backbone {backbone!r}: use a released name ({', '.join(RELEASED)}) or a ViT of timm")
    try:
        model = timm.create_model(name, pretrained=False, dynamic_img_size=True, **overrides)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"timm cannot build {backbone} with {overrides}: {one_line(error)}") from error
    if type(model) not in _ENCODERS:
        kind = type(model).__name__
        raise ValueError(f"{backbone} is a {kind}, not a plain ViT: choose a VisionTransformer or Eva of timm")
    kinds = {type(block).__name__ for block in model.blocks} - {"Block", "EvaBlock"}
    if kinds:
        raise ValueError(f"{backbone} has blocks of another kind ({', '.join(kinds)}), choose a plain ViT of timm")
    # timm's registry has no place for another class; the subclasses only override one method.
    model.__class__ = _ENCODERS[type(model)]
    return model


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


class EncoderWithQueries(QueryEncoder, Encoder): ...


class DistilledEncoderWithQueries(QueryEncoder, DistilledEncoder): ...


def add_queries(encoder: nn.Module, n_queries: int, n_query_blocks: int) -> None:
    """Let learned queries join the tokens of the last blocks of an encoder, in place.

    Raises:
        ValueError: rotary embeddings, which give queries no position, or more blocks than there are.
    """
    kinds = {Encoder: EncoderWithQueries, DistilledEncoder: DistilledEncoderWithQueries}
    if type(encoder) not in kinds:
        raise ValueError(f"eomt takes a VisionTransformer of timm, not {type(encoder).__name__}")
    if not 1 <= n_query_blocks <= len(encoder.blocks):
        raise ValueError(f"eomt: queries join the last {n_query_blocks} blocks, the encoder has {len(encoder.blocks)}")
    encoder.__class__ = kinds[type(encoder)]
    encoder.queries = nn.Parameter(torch.randn(1, n_queries, encoder.embed_dim))
    encoder.n_query_blocks = n_query_blocks
