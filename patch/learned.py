"""Learned parts of methods: built into an encoder under the published names, and only switched on by a patch."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from patch.families import family_of
from patch.method import find


def add_modules(encoder: nn.Module, method: str, **options: Any) -> nn.Module:
    """Build the learned parts of a method into an encoder, with initial values; nothing happens where it has none.

    Args:
        encoder: a ViT that `patch.apply` knows, not patched.
        method: a registered name.
        options: of its learned parts.

    Returns:
        The encoder.

    Raises:
        ValueError: an unknown method, parts that are there already, or an encoder that cannot take them.
    """
    entry = find(method)
    if entry.modules is None:
        return encoder
    if has_modules(encoder, method):
        raise ValueError(f"the encoder has the learned parts of {method} already")
    entry.modules(encoder, family_of(encoder).blocks(encoder), **options)
    encoder.__dict__["learned_parts"] = (*getattr(encoder, "learned_parts", ()), method)
    return encoder


def has_modules(encoder: nn.Module, method: str) -> bool:
    """Whether an encoder has the learned parts of a method; True for a method without."""
    return find(method).modules is None or method in getattr(encoder, "learned_parts", ())


class DecoupledQKV(nn.Module):
    """The projection of an attention with an embedding beside it, by which tokens are compared (DTEM, section 3.1).

    Args:
        qkv: the projection, which stays as it is.
        width: of the embedding.
    """

    def __init__(self, qkv: nn.Linear, width: int) -> None:
        super().__init__()
        self.qkv_layer = qkv
        self.metric_layer = nn.Linear(qkv.in_features, width, device=qkv.weight.device, dtype=qkv.weight.dtype)

    @property
    def weight(self) -> Tensor:
        """That of the projection, which timm's `Eva` reads."""
        return self.qkv_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, D) -> (B, L, 3·D)"""
        return self.qkv_layer(x)


def add_embeddings(encoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Give every block DTEM's embedding: as wide as a head, or twice that from a width of 1024 on.

    Raises:
        ValueError: an attention without one projection of queries, keys and values.
    """
    if any(getattr(block.attn, "qkv", None) is None for block in blocks):
        raise ValueError("dtem needs attention with one projection for queries, keys and values: this model has three")
    for block in blocks:
        head = block.attn.head_dim
        block.attn.qkv = DecoupledQKV(block.attn.qkv, head if block.attn.qkv.in_features < 1024 else 2 * head)
