"""Decoders whose queries predict masks and classes (SegViT, EoMT), and the way from these to scores of pixels."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from segm.model.upsample import upsample, upsampled_bands

HEAD_WIDTH = 32  # of SegViT's attention
POWER = 0.9  # of the annealing of EoMT's masks


class Prediction(NamedTuple):
    """Masks and classes that queries predict for images.

    Attributes:
        classes: (B, Q, K + 1), class logits of every query; the last class is "nothing in this image".
        masks: (B, Q, h, w), mask logits of every query.
    """

    classes: Tensor
    masks: Tensor


def class_scores(found: Prediction, size: Sequence[int]) -> Tensor:
    """Scores of pixels, (B, K, *size), from 0 to the number of queries: how much the masks of a class cover them.

    Classes are innermost in memory, as in the scores of all decoders: the argmax reads contiguous memory.
    """
    probabilities = found.classes.softmax(-1)[..., :-1]
    covered = upsample(found.masks, size).sigmoid_()  # the largest tensor of the pass: not held twice
    return (covered.flatten(2).mT @ probabilities).mT.unflatten(2, tuple(size))


def best_classes(found: Prediction, size: Sequence[int]) -> Tensor:
    """`class_scores(found, size).argmax(1)`, but for ties, without the masks and scores of the whole image.

    Returns:
        (B, *size), int64.
    """
    probabilities = found.classes.float().softmax(-1)[..., :-1]
    labels = torch.empty(len(probabilities), *size, dtype=torch.long, device=probabilities.device)
    for own, masks, weights in zip(labels, found.masks.float(), probabilities, strict=True):
        for band, part in upsampled_bands(masks, size):
            scores = part.sigmoid_().flatten(1).mT @ weights
            own[band] = scores.argmax(-1).unflatten(0, part.shape[1:])
    return labels


class AttentionToMask(nn.Module):
    """A post-norm layer of width `dim`: queries attend to each other, then to a map (SegViT, section 3.2); dropout is
    in attention and between the layers."""

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
        attended = (self.drop(scores.softmax(-1)) @ v).transpose(1, 2).flatten(2)
        queries = self.norm2(queries + self.drop(self.proj(attended)))
        return self.norm3(queries + self.drop(self.mlp(queries))), scores.mean(1)


class SegViT(nn.Module):
    """SegViT's decoder (Zhang et al., 2022, arXiv 2210.05844, section 3), its first version.

    A class is predicted where its query attends, weighted by the probability that the class is in the image. The
    second version, with one stage and "present or absent" per class, is another decoder.

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
        self.blocks = nn.ModuleList()  # no block sees the tokens of the encoder: nothing to patch
        self.query = nn.Parameter(torch.randn(n_cls, width))
        self.inputs = nn.ModuleList(nn.Sequential(nn.Linear(dim, width), nn.LayerNorm(width)) for _ in self.reads)
        self.stages = nn.ModuleList(
            nn.ModuleList(AttentionToMask(width, n_heads, dropout) for _ in range(n_layers)) for _ in self.reads
        )
        self.head = nn.Linear(width, n_cls + 1)

    def forward(self, maps: Sequence[Tensor]) -> list[Prediction]:
        """maps: (B, D, gh, gw) of every block that it reads -> the predictions of all stages, deepest block first.

        The last one counts; all are trained.
        """
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


class ScaleBlock(nn.Sequential):
    """(B, D, h, w) -> (B, D, 2h, 2w)"""

    def __init__(self, dim: int) -> None:
        from timm.layers import LayerNorm2d  # here, for timm is slow to import

        up, mix = nn.ConvTranspose2d(dim, dim, 2, stride=2), nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        super().__init__(up, nn.GELU(), mix, LayerNorm2d(dim))


class EoMT(nn.Module):
    """Masks and classes of the queries of a `QueryEncoder` (EoMT: Kerssies et al., 2025, arXiv 2503.19108, section 3).

    Args:
        dim: width of the encoder.
        n_cls: number of classes, K.
        patch_side: pixels; masks have a quarter of the pixels of the image in both directions.
        n_queries: Q.
        n_query_blocks: number of blocks whose tokens they join.

    Attributes:
        mask_probs: (n_query_blocks,), probability in training that a query of this block sees only the patches of its
            own mask.
    """

    predicts_masks = True
    mask_probs: Tensor

    def __init__(self, dim: int, n_cls: int, patch_side: int, n_queries: int, n_query_blocks: int) -> None:
        super().__init__()
        self.n_queries, self.scale = n_queries, patch_side
        self.blocks = nn.ModuleList()  # those of the encoder serve
        self.head = nn.Linear(dim, n_cls + 1)
        layers = nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)
        self.mask_head = nn.Sequential(*layers)
        n_steps = max(1, round(math.log2(patch_side / 4)))  # to a quarter of the image
        self.upscale = nn.Sequential(*(ScaleBlock(dim) for _ in range(n_steps)))
        self.register_buffer("mask_probs", torch.ones(n_query_blocks))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if prefix + "masked" in state_dict:  # its name in older checkpoints
            state_dict[prefix + "mask_probs"] = state_dict.pop(prefix + "masked")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, queries: Tensor, features: Tensor) -> Prediction:
        """queries: (B, Q, D), features: (B, D, gh, gw), both after the encoder's last norm."""
        masks = torch.einsum("bqd,bdhw->bqhw", self.mask_head(queries), self.upscale(features))
        return Prediction(self.head(queries), masks)

    def anneal(self, progress: float) -> None:
        """Mask attention less and less, one block after the other (section 3.3); what is unmasked stays so.

        Args:
            progress: share of the training that is over, 0 to 1.
        """
        parts = len(self.mask_probs) + 2
        done = [min(max(progress * parts - index - 1, 0.0), 1.0) for index in range(len(self.mask_probs))]
        self.mask_probs.clamp_(max=self.mask_probs.new_tensor([(1 - part) ** POWER for part in done]))

    def mask(self, index: int, masks: Tensor, grid: tuple[int, int], n_tokens: int) -> Tensor:
        """Additive attention mask: queries see each other, the prefix tokens and the patches of their own mask.

        Args:
            index: of the block among those with queries, counted from 0.
            masks: (B, Q, h, w), logits.
            grid: (gh, gw), patches.
            n_tokens: L.

        Returns:
            (B, 1, L, L).
        """
        n_images, n_queries, n_patches = *masks.shape[:2], grid[0] * grid[1]
        free = torch.rand(n_images, n_queries, 1, device=masks.device) >= self.mask_probs[index]
        seen = free | (upsample(masks.detach(), grid).flatten(2) > 0)
        mask = masks.new_zeros(n_images, 1, n_tokens, n_tokens)
        mask[:, 0, :n_queries, n_tokens - n_patches :].masked_fill_(~seen, float("-inf"))
        return mask
