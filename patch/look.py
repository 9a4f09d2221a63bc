"""A look at the tokens of one block through its attention, computed when a method asks."""

from typing import Any

import torch
from torch import Tensor

from g2tm import cls_attention, received_attention
from g2tm.selection import cached
from patch.attention import QKV, AttentionMask, QKRecorder, SoftMaskAttention
from patch.layout import Rows


class Look:
    """A look at the attention that has just run in a block, for the patch tokens.

    It holds references and computes nothing until it is asked.

    Args:
        block: the patched block.
        layout: how the tokens lay in it.
        x: the input of the block.
        normed: the normalized input of its attention.
        rotary: the rotary embedding of the tokens; None: the model has none.
        mask: what attention was handed.
        soft: whether gradients reach what the method chooses by.
    """

    def __init__(
        self,
        block: Any,
        layout: Rows,
        x: Tensor,
        normed: Tensor,
        rotary: Tensor | None,
        mask: AttentionMask | Tensor | None,
        soft: bool,
    ) -> None:
        self._block, self._layout, self._x, self._normed = block, layout, x, normed
        self._rotary, self._mask, self._soft = rotary, mask, soft

    @cached
    def input(self) -> Tensor:
        """(B, N, D), the input of the block."""
        return self._patches(self._layout.rows(self._x))

    @cached
    def normed(self) -> Tensor:
        """(B, N, D), the normalized input of the block's attention."""
        return self._patches(self._layout.rows(self._normed))

    @cached
    def queries(self) -> Tensor:
        """(B, N, head dim), see `keys`."""
        return self._mean_of_heads(0)

    @cached
    def keys(self) -> Tensor:
        """(B, N, head dim), keys averaged over the heads, float32, before any rotation: rotated ones tell where a
        token stands, not what it shows."""
        return self._mean_of_heads(1)

    @cached
    def values(self) -> Tensor:
        """(B, N, head dim), see `keys`."""
        return self._mean_of_heads(2)

    def _mean_of_heads(self, index: int) -> Tensor:
        with self._gradients():
            x = (self._qkv if self._qkv is not None and self._rotary is None else self._projected)[index]
            return self._patches(self._layout.rows(x.float().mean(1)))

    @cached
    def cls_attention(self) -> Tensor:
        """(B, N), float32, attention of CLS to every token, averaged over the heads."""
        with self._gradients():
            if isinstance(self._mask, SoftMaskAttention):
                return self._patches(self._mask.map[:, :, 0].mean(1))
            return self._patches(cls_attention(*self._query_key, bias=self._layout.bias, scale=self._scale))

    @cached
    def received_attention(self) -> Tensor:
        """(B, N), float32, attention that every token gets, averaged over heads and queries."""
        with self._gradients():
            if isinstance(self._mask, SoftMaskAttention):
                return self._patches(self._mask.map.mean((1, 2)))
            return self._patches(received_attention(*self._query_key, bias=self._layout.bias, scale=self._scale))

    def _patches(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (B, N, ...), without the tokens before and after the patch tokens."""
        before, after = self._layout.n_around
        return x[:, before : x.shape[1] - after]

    def _gradients(self) -> torch.set_grad_enabled:
        return torch.set_grad_enabled(torch.is_grad_enabled() and self._soft)

    @property
    def _scale(self) -> float:
        return self._block.attention_scale

    @property
    def _qkv(self) -> QKV | None:
        """Queries, keys and values as attention used them, (B, H, L, d) or concatenated; None where nobody kept
        them."""
        return self._mask.qkv if isinstance(self._mask, QKRecorder | SoftMaskAttention) else None

    @cached
    def _projected(self) -> QKV:
        """Queries, keys and values before any rotation, (B, H, L, d) or concatenated."""
        return self._block.project(self._normed)

    @property
    def _query_key(self) -> tuple[Tensor, Tensor]:
        """Queries and keys in rows, as they were multiplied: (B, H, L, d) each."""
        query, key, _ = self._qkv or self._projected
        if self._qkv is None and self._rotary is not None:
            query, key = (self._block.rotate(x, self._rotary) for x in (query, key))
        return self._heads_in_rows(query), self._heads_in_rows(key)

    def _heads_in_rows(self, x: Tensor) -> Tensor:
        """(1, H, T, d) or (B, H, L, d) -> (B, H, L, d)"""
        return self._layout.rows(x.transpose(1, 2)).transpose(1, 2)
