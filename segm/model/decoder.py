"""Decoders: those that give every token its logits and know nothing of the patch grid, and those that read maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from segm.config import DECODERS
from segm.model.masks import EoMT, SegViT


class LinearDecoder(nn.Module):
    """One linear layer per token (Segmenter, section 3.2)."""

    def __init__(self, dim: int, n_cls: int) -> None:
        super().__init__()
        self.head = nn.Linear(dim, n_cls)
        self.blocks = nn.ModuleList()  # no attention: nothing to patch, nothing to show
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, M, D) patch tokens -> logits (B, M, n_cls)."""
        return self.head(x)


class MaskTransformer(nn.Module):
    """Class embeddings attend together with the patch tokens; a logit is the product of a patch feature and a
    class feature (Segmenter, section 3.2).

    Args:
        dim: width of the encoder and of the decoder; one attention head per 64.
        n_cls: number of classes.
        n_layers: number of transformer blocks.
        dropout: dropout in attention and MLP.
        drop_path_rate: stochastic depth, rising linearly over the blocks.
    """

    def __init__(
        self, dim: int, n_cls: int, n_layers: int = 2, dropout: float = 0.1, drop_path_rate: float = 0.0
    ) -> None:
        super().__init__()
        n_heads = max(1, dim // 64)
        if dim % n_heads:
            raise ValueError(f"decoder of width {dim}: {n_heads} heads do not divide it, choose a multiple of 64")
        self.n_cls = n_cls
        self.cls_emb = nn.Parameter(torch.zeros(1, n_cls, dim))
        self.proj_dec = nn.Linear(dim, dim)
        self.proj_patch = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        self.proj_classes = nn.Parameter(dim**-0.5 * torch.randn(dim, dim))
        drop = {"proj_drop": dropout, "attn_drop": dropout}
        self.blocks = nn.ModuleList(
            Block(dim, n_heads, qkv_bias=True, drop_path=drop_path, norm_layer=nn.LayerNorm, **drop)
            for drop_path in torch.linspace(0, drop_path_rate, n_layers, device="cpu").tolist()
        )
        self.decoder_norm = nn.LayerNorm(dim)
        self.mask_norm = nn.LayerNorm(n_cls)
        self.apply(_init_weights)
        nn.init.trunc_normal_(self.cls_emb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, M, D) patch tokens -> logits (B, M, n_cls)."""
        x = self.proj_dec(x)
        x = torch.cat([x, self.cls_emb.expand(x.shape[0], -1, -1)], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.decoder_norm(x)
        patches, classes = x[:, : -self.n_cls], x[:, -self.n_cls :]
        patches = F.normalize(patches @ self.proj_patch, dim=-1)
        classes = F.normalize(classes @ self.proj_classes, dim=-1)
        return self.mask_norm(patches @ classes.transpose(1, 2))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class LinearBN(nn.Module):
    """BatchNorm and a 1×1 convolution on the last blocks, concatenated: the probe of DINOv2 and DINOv3 (Oquab et al.,
    2023, section 7.4).

    Args:
        dim: width of the encoder.
        n_cls: number of classes.
        depth: blocks of the encoder.
        n_blocks: number of blocks that it reads, the last ones.

    Attributes:
        reads: 0-based indices of the blocks whose outputs it is given, before the encoder's last norm. Every decoder
            that reads maps on the patch grid has it, `scale` and `neck`.
        scale: rows and columns of its logits per patch.
        neck: from the maps of these blocks to the input of the decoder and of its auxiliary heads.
    """

    scale = 1

    def __init__(self, dim: int, n_cls: int, depth: int, n_blocks: int = 1) -> None:
        super().__init__()
        if not 1 <= n_blocks <= depth:
            raise ValueError(f"linear_bn reads the last {n_blocks} blocks, the encoder has {depth}")
        self.reads = list(range(depth - n_blocks, depth))
        self.neck = nn.Identity()
        self.blocks = nn.ModuleList()  # no attention: nothing to patch, nothing to show
        self.bn = nn.BatchNorm2d(n_blocks * dim)
        self.head = nn.Conv2d(n_blocks * dim, n_cls, 1)
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: (B, D, gh, gw) each -> logits (B, n_cls, gh, gw)."""
        return self.head(self.bn(torch.cat([*maps], dim=1)))


OPENMMLAB = ("setr_naive", "setr_pup", "setr_mla", "upernet")


def create_decoder(
    dim: int, n_cls: int, settings: Mapping[str, Any], depth: int, patch_side: int
) -> tuple[nn.Module, list[nn.Module]]:
    """Build a decoder, and the auxiliary heads that are trained with it.

    Args:
        dim: width of the encoder.
        n_cls: number of classes.
        settings: `name` and, for `mask_transformer`, optionally `n_layers`, `dropout`, `drop_path_rate`; for
            `linear_bn` `n_blocks`; for `segvit` `n_layers`, `dropout`; for `eomt` `n_queries`, `n_blocks`.
        depth: blocks of the encoder.
        patch_side: pixels.

    Raises:
        ValueError: unknown name.
    """
    name = settings.get("name")
    if name == "linear":
        return LinearDecoder(dim, n_cls), []
    if name == "mask_transformer":
        names = ("n_layers", "dropout", "drop_path_rate")
        return MaskTransformer(dim, n_cls, **{k: settings[k] for k in names if settings.get(k) is not None}), []
    if name == "linear_bn":
        return LinearBN(dim, n_cls, depth, settings.get("n_blocks") or 1), []
    if name == "segvit":
        return SegViT(dim, n_cls, depth, patch_side, settings.get("n_layers", 3), settings.get("dropout", 0.1)), []
    if name == "eomt":
        return EoMT(dim, n_cls, patch_side, settings.get("n_queries", 100), settings.get("n_blocks", 3)), []
    if name in OPENMMLAB:
        from segm.model.openmmlab_heads import build  # imports mmseg, which the others do without

        return build(name, dim, n_cls, depth)
    raise ValueError(f"unknown decoder {name!r}: choose one of {', '.join(DECODERS)}")
