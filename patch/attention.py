"""The one seam through which masks and biases enter attention, and through which queries and keys can be seen.

No attention code is copied: a block hands its own attention module a mask, and the mask takes the place of
`scaled_dot_product_attention` where the module calls it.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm import masked_softmax
from g2tm.selection import without_autocast

QKV = tuple[Tensor, Tensor, Tensor]
HALF = (torch.float16, torch.bfloat16)
# Stands for -inf in a key's channel; exact in every dtype. Divided by the square root of the head dimension, it takes
# 3600 off a logit even at a head dimension of 80, and exp(-104) is 0 in float32.
PADDING = -(2.0**15)
ALIGNMENT = 8  # channels: what the kernels ask of a head dimension


class AttentionMask:
    """An object that takes the place of `scaled_dot_product_attention` where it is handed over as `attn_mask`.

    PyTorch lets any object with `__torch_function__` do so; everywhere else such a mask is refused with a TypeError.

    Attributes:
        was_taken: whether attention ran under it.
    """

    was_taken = False

    def attend(self, qkv: QKV, dropout_p: float = 0.0, scale: float | None = None, **options: Any) -> Tensor:
        """Queries, keys, values, (B, H, L, d) each -> (B, H, L, d); options: of `scaled_dot_product_attention`."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is not F.scaled_dot_product_attention:
            return NotImplemented
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | dict(kwargs or {})
        qkv = given.pop("query"), given.pop("key"), given.pop("value")
        mask: AttentionMask = given.pop("attn_mask")
        mask.was_taken = True
        return mask.attend(qkv, **given)


class QKRecorder(AttentionMask):
    """Keeps the queries, keys and values that attention works with, and lets it go on with another mask.

    Args:
        mask: that mask; None: none.

    Attributes:
        qkv: queries, keys and values, (B, H, L, d) each, once attention has run.
    """

    def __init__(self, mask: AttentionMask | Tensor | None) -> None:
        self.mask = mask
        self.qkv: QKV | None = None

    def attend(self, qkv: QKV, dropout_p: float = 0.0, scale: float | None = None, **options: Any) -> Tensor:
        self.qkv, mask = qkv, self.mask
        options |= {"dropout_p": dropout_p, "scale": scale}
        if isinstance(mask, AttentionMask):
            return mask.attend(qkv, **options)
        return F.scaled_dot_product_attention(*qkv, attn_mask=mask, **options)


class SizeBias(AttentionMask):
    """An additive bias of the keys that enters fused attention by channels.

    Flash attention takes no additive bias: with one, PyTorch falls back to slower kernels. But a bias per key is part
    of a dot product: give every query a channel of ones, and every key the bias in that channel. It becomes one
    channel of the keys, or two in half precision: the bias rounded, and what rounding left. No bias is handed on.

    The error that remains in the bias itself is 2⁻¹⁷ (bfloat16) and 2⁻²² (float16) of its value; as an additive bias
    in that dtype it would be 2⁻⁹ and 2⁻¹². Tolerance of the output, absolute plus relative, for values of unit variance
    and sizes up to 900, against float64 on the CPU: 1e-5 in float32, 4e-3 in bfloat16 and 5e-4 in float16; that is
    less than half the error of an additive bias in half precision. The GPU's kernels have not been compared yet.

    Args:
        bias: (B, 1, 1, L), float32; -inf marks padding.
    """

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def attend(self, qkv: QKV, dropout_p: float = 0.0, scale: float | None = None, **options: Any) -> Tensor:
        scale = qkv[0].shape[-1] ** -0.5 if scale is None else scale
        wide = append_bias_channels(*qkv, self.bias, scale)
        out = F.scaled_dot_product_attention(*wide, dropout_p=dropout_p, scale=scale, **options)
        return out[..., : qkv[2].shape[-1]]


@dataclass(frozen=True)
class SoftMasking:
    """The way in which a mask enters the attention of a training step, see `g2tm.masked_softmax`.

    Attributes:
        epsilon, keeps_self: its arguments.
    """

    epsilon: float
    keeps_self: bool


class SoftMaskAttention(AttentionMask):
    """Explicit attention under a mask of tokens that carries gradients, with which a learned method trains.

    Args:
        mask: (B, L), of the keys.
        bias: (B, 1, 1, L), of the keys; None: none.
        masking: how the mask enters.

    Attributes:
        qkv: queries, keys and values, (B, H, L, d) each, once attention has run.
        map: attention probabilities, (B, H, L, L), likewise.
    """

    map: Tensor

    def __init__(self, mask: Tensor, bias: Tensor | None, masking: SoftMasking) -> None:
        self.mask, self.bias, self.masking = mask, bias, masking
        self.qkv: QKV | None = None

    def attend(self, qkv: QKV, dropout_p: float = 0.0, scale: float | None = None, **options: Any) -> Tensor:
        query, key, value = qkv
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        with without_autocast(query):
            logits = query.float() @ key.float().mT * scale
            logits = logits if self.bias is None else logits + self.bias
            self.map = masked_softmax(logits, self.mask, self.masking.epsilon, self.masking.keeps_self)
        self.qkv = qkv
        return F.dropout(self.map, dropout_p).to(value.dtype) @ value


class BlockDiagonal(AttentionMask):
    """Lets the concatenated tokens of several images attend within their image.

    Args:
        lengths: B numbers of tokens that sum to T.
        starts: (B + 1,), int32, where each image begins, and the end of the last.
        bias: (1, 1, 1, T), float32, of the keys; None: none.
    """

    def __init__(self, lengths: Sequence[int], starts: Tensor, bias: Tensor | None) -> None:
        self.lengths, self.starts, self.bias = list(lengths), starts, bias

    def attend(self, qkv: QKV, dropout_p: float = 0.0, scale: float | None = None, **options: Any) -> Tensor:
        """Queries, keys, values, (1, H, T, d) each -> (1, H, T, d)"""
        scale = qkv[0].shape[-1] ** -0.5 if scale is None else scale
        attention = _in_one_kernel if qkv[0].device.type == "cuda" else _image_by_image
        return attention(*qkv, self, dropout_p, scale)


def bias_in_channels(x: Tensor) -> bool:
    """Return whether the bias of tokens goes through channels: on a GPU, where attention runs in half precision.

    In float32 there is no flash kernel, and on the CPU more channels cost at least as much as an additive bias, which
    takes 3 to 6 % of attention (ViT-S, 420 to 785 tokens).
    """
    if x.device.type != "cuda":
        return False
    return (torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype) in HALF


def can_pack(x: Tensor, dropout: float = 0.0) -> bool:
    """Return whether attention runs within the images of a packed sequence, where these tokens are.

    On the CPU it does, image by image. On a GPU it takes a kernel for sequences of different lengths, which there is
    in half precision from compute capability 8.0 on, and without dropout.

    Args:
        x: the tokens.
        dropout: probability with which attention weights are dropped.
    """
    if torch.compiler.is_compiling():
        return False
    if x.device.type != "cuda":
        return x.device.type == "cpu"
    has_kernel = torch.backends.cuda.flash_sdp_enabled() and _varlen_kernel() is not None
    return has_kernel and not dropout and bias_in_channels(x) and torch.cuda.get_device_capability(x.device) >= (8, 0)


@cache
def _varlen_kernel() -> Callable[..., Any] | None:
    """PyTorch's attention for sequences of different lengths, if it takes a scale; it is slow to import."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "scale" in inspect.signature(varlen_attn).parameters else None


def _image_by_image(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockDiagonal, dropout: float, scale: float
) -> Tensor:
    """(1, H, T, d), laid out as (1, T, H, d), as timm goes on with it."""
    images = (x.split(mask.lengths, dim=2) for x in (query, key, value))
    bias, none = mask.bias, [None] * len(mask.lengths)
    biases: Sequence[Any] = none if bias is None else bias.to(query.dtype).split(mask.lengths, dim=3)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=own, dropout_p=dropout, scale=scale).transpose(1, 2)
        for q, k, v, own in zip(*images, biases, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockDiagonal, dropout: float, scale: float
) -> Tensor:
    """(1, H, T, d); the kernel takes no bias, so it goes through channels."""
    assert not dropout
    width = value.shape[-1]
    query, key, value = append_bias_channels(query, key, value, mask.bias, scale)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    starts, longest, kernel = mask.starts, max(mask.lengths), _varlen_kernel()
    assert kernel is not None
    output: Any = kernel(q, k, v, starts, starts, longest, longest, scale=scale)
    return output[..., :width].transpose(0, 1).unsqueeze(0)


def append_bias_channels(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values whose products hold the bias, all of one width that the kernels accept.

    Args:
        query, key: (B, H, L, d).
        value: (B, H, L, d'), whose dtype all get: norms of queries and keys leave float32 under autocast.
        bias: (B, 1, 1, L), -inf marks padding; None: there is none.
        scale: of the logits.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)
    channels = key.new_zeros(1, 1, 1, 0) if bias is None else key_channels(bias, scale, key.dtype)
    n_channels = channels.shape[-1]
    needed = max(query.shape[-1] + n_channels, value.shape[-1])
    width = needed + -needed % ALIGNMENT
    rest = width - query.shape[-1] - n_channels
    query = torch.cat([F.pad(query, (0, n_channels), value=1.0), query.new_zeros(*query.shape[:-1], rest)], -1)
    key = torch.cat([key, F.pad(channels, (0, rest)).expand(*key.shape[:-1], -1)], -1)
    return query, key, F.pad(value, (0, width - value.shape[-1]))


def key_channels(bias: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """Channels of the keys whose sum, times `scale`, is the bias.

    Args:
        bias: (B, 1, 1, M), -inf marks padding.
        scale: of the logits.
        dtype: of the keys.

    Returns:
        (B, 1, M, 1) in float32 and float64, (B, 1, M, 2) in half precision.
    """
    exact = (bias / scale).clamp(min=PADDING).transpose(-2, -1)
    if dtype not in HALF:
        return exact.to(dtype)
    high = exact.to(dtype)
    return torch.cat([high, (exact - high).to(dtype)], dim=-1)
