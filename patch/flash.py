"""The bias of merged tokens through kernels that take no bias.

Flash attention takes no additive bias: with one, PyTorch falls back to slower kernels. But a bias per key is part of
a dot product: give every query a channel of ones, and every key the bias in that channel.
"""

import torch
import torch.nn.functional as F

HALF = (torch.float16, torch.bfloat16)
# Stands for -inf in a key's channel; exact in every dtype. Divided by the square root of the head dimension, it takes
# 3600 off a logit even at a head dimension of 80, and exp(-104) is 0 in float32.
PADDING = -(2.0**15)
ALIGNMENT = 8  # channels: what the kernels ask of a head dimension


def carries(x):
    """Whether the bias of tokens is to go through channels: on a GPU, where attention runs in half precision.

    In float32 there is no flash kernel, and on the CPU an additive bias costs nothing.
    """
    if x.device.type != "cuda":
        return False
    return (torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype) in HALF


class AttentionMask(torch.Tensor):
    """What stands for `scaled_dot_product_attention` where it is handed this as `attn_mask`, by whatever code: the
    `attend` of a subclass, with the same arguments. Everywhere else it is an ordinary tensor."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            function = cls.attend if function is F.scaled_dot_product_attention else function
            return function(*args, **(kwargs or {}))


class KeyBias(AttentionMask):
    """An additive bias of the keys, (B, 1, 1, M), float32, that enters fused attention by channels.

    It becomes one channel of the keys, or two in half precision: the bias rounded, and what rounding left. No
    bias is handed on.

    The error that remains in the bias itself is 2⁻¹⁷ (bfloat16) and 2⁻²² (float16) of its value; as an additive bias
    in that dtype it would be 2⁻⁹ and 2⁻¹². Tolerance of the output, absolute plus relative, for values of unit variance
    and sizes up to 900, against float64 on the CPU: 1e-5 in float32, 4e-3 in bfloat16 and 5e-4 in float16; that is
    less than half the error of an additive bias in half precision. The GPU's kernels have not been compared yet.
    """

    @staticmethod
    def attend(query, key, value, attn_mask, scale=None, **options):
        """query, key, value: (B, H, L, d) -> (B, H, L, d)"""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        carried = carry(query, key, value, attn_mask, scale)
        return F.scaled_dot_product_attention(*carried, scale=scale, **options)[..., : value.shape[-1]]


def carry(query, key, value, bias, scale):
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


def key_channels(bias, scale, dtype):
    """What the channels of the keys hold: their sum times `scale` is the bias.

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
