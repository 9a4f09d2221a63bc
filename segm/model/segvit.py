"""SegViT's decoder, first version: class queries attend to blocks of the encoder, and their attention is the mask."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from segm.model.masks import Prediction

HEAD_WIDTH = 32


class AttentionToMask(nn.Module):
    """A post-norm layer: queries attend to each other, then to a map (SegViT, section 3.2).

    Args:
        dim: width of queries and map.
        n_heads: attention heads.
        dropout: in attention and between the layers.
    """

    def __init__(self, dim: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.self_attn = nn.MultiheadAttention(dim, n_heads, dropout, batch_first=True)
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.drop = nn.Dropout(dropout)

    def forward(self, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """queries: (B, K, d), tokens: (B, N, d) -> queries, and scores before the softmax, (B, K, N), averaged over
        the heads."""
        own, _ = self.self_attn(queries, queries, queries, need_weights=False)
        queries = self.norm1(queries + self.drop(own))
        split = (queries.shape[0], -1, self.n_heads, queries.shape[2] // self.n_heads)
        q, k, v = (
            layer(x).view(split).transpose(1, 2) for layer, x in ((self.q, queries), (self.k, tokens), (self.v, tokens))
        )
        scores = q @ k.mT * q.shape[-1] ** -0.5
        seen = (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        queries = self.norm2(queries + self.drop(self.proj(seen)))
        return self.norm3(queries + self.drop(self.mlp(queries))), scores.mean(1)


class SegViT(nn.Module):
    """SegViT's decoder (Zhang et al., 2022, arXiv 2210.05844, section 3), its first version.

    A class is predicted where its query attends, as far as that query finds its class in the image. The second
    version, with one stage and "present or absent" per class, is another decoder.

    Args:
        dim: width of the encoder.
        n_cls: number of classes, K.
        depth: blocks of the encoder.
        patch_side: pixels; masks are resized to them before they are weighed.
        n_layers: layers of a stage.
        dropout: see `AttentionToMask`.
    """

    predicts_masks = True

    def __init__(
        self, dim: int, n_cls: int, depth: int, patch_side: int, n_layers: int = 3, dropout: float = 0.1
    ) -> None:
        super().__init__()
        width = dim // 2
        n_heads = max(1, width // HEAD_WIDTH)
        if width % n_heads:
            raise ValueError(f"segvit of width {width}: {n_heads} heads do not divide it, choose a multiple of 64")
        self.reads = read_blocks(depth)
        self.scale = patch_side
        self.neck = nn.Identity()
        self.blocks = nn.ModuleList()  # none whose tokens are those of the encoder: nothing to patch
        self.query = nn.Parameter(torch.randn(n_cls, width))
        self.inputs = nn.ModuleList(nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width)) for _ in self.reads)
        self.stages = nn.ModuleList(
            nn.ModuleList(AttentionToMask(width, n_heads, dropout) for _ in range(n_layers)) for _ in self.reads
        )
        self.head = nn.Linear(width, n_cls + 1)

    def forward(self, maps: Sequence[Tensor]) -> list[Prediction]:
        """maps: (B, D, gh, gw) of every block that it reads -> what every stage predicts, of the deepest block first;
        the last one counts, all are trained."""
        queries, found = self.query.expand(maps[0].shape[0], -1, -1), []
        total = 0
        for features, project, layers in zip(maps, self.inputs, self.stages, strict=True):
            tokens = project(features.flatten(2).mT)
            for layer in layers:
                queries, scores = layer(queries, tokens)
            total = total + scores.unflatten(2, features.shape[2:])
            found.append(Prediction(self.head(queries), total))
        return found


def read_blocks(depth: int) -> list[int]:
    """0-based blocks, the deepest first: 12, 8, 6 of 12, and 24, 16, 8 of 24."""
    earliest = depth // 3 if depth >= 24 else depth // 2
    return [depth - 1, -(-2 * depth // 3) - 1, max(earliest, 1) - 1]
