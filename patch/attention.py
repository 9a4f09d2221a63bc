"""The one seam through which masks and biases enter attention, and through which queries and keys can be seen.

No attention code is copied: a block hands its own attention module a mask, and the mask takes the place of
`scaled_dot_product_attention` where the module calls it.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g2tm import Reduction, masked_softmax

if TYPE_CHECKING:
    from patch.method import Masking
    from patch.packing import Packing

try:
    from torch.nn.attention.varlen import varlen_attn

    HAS_VARLEN = "scale" in inspect.signature(varlen_attn).parameters
except ImportError:
    HAS_VARLEN = False

HALF = (torch.float16, torch.bfloat16)
# Stands for -inf in a key's channel; exact in every dtype. Divided by the square root of the head dimension, it takes
# 3600 off a logit even at a head dimension of 80, and exp(-104) is 0 in float32.
PADDING = -(2.0**15)
ALIGNMENT = 8  # channels: what the kernels ask of a head dimension


def can_look(attn: nn.Module) -> bool:
    """Whether the queries and keys of an attention module can be seen while it runs: not in compiled code."""
    return not torch.compiler.is_compiling() and attn._compiled_call_impl is None


class AttentionMask(Tensor):
    """What stands for `scaled_dot_product_attention` where it is handed this as `attn_mask`, by whatever code: the
    `attend` of a subclass, with the same arguments. Everywhere else it is an ordinary tensor."""

    attend: Callable[..., Tensor]

    @classmethod
    def of(cls, **attributes: Any) -> Self:
        """A mask with these attributes."""
        mask = torch.empty(0).as_subclass(cls)
        mask.__dict__.update(attributes)
        return mask

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            function = cls.attend if function is F.scaled_dot_product_attention else function
            return function(*args, **(kwargs or {}))


class Seen(AttentionMask):
    """Keeps the queries and keys that attention works with, and lets it go on with the mask that it stands for.

    Attributes:
        mask: that mask, or None.
        pair: queries and keys, (B, H, L, d) each, once attention has run.
    """

    mask: Tensor | None
    pair: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: "Seen", **options: Any) -> Tensor:
        """query, key, value: (B, H, L, d) -> (B, H, L, d)"""
        attn_mask.pair, mask = (query, key), attn_mask.mask
        attend = type(mask).attend if isinstance(mask, AttentionMask) else F.scaled_dot_product_attention
        return attend(query, key, value, attn_mask=mask, **options)


class KeyBias(AttentionMask):
    """An additive bias of the keys, (B, 1, 1, M), float32, that enters fused attention by channels.

    Flash attention takes no additive bias: with one, PyTorch falls back to slower kernels. But a bias per key is part
    of a dot product: give every query a channel of ones, and every key the bias in that channel. It becomes one
    channel of the keys, or two in half precision: the bias rounded, and what rounding left. No bias is handed on.

    The error that remains in the bias itself is 2⁻¹⁷ (bfloat16) and 2⁻²² (float16) of its value; as an additive bias
    in that dtype it would be 2⁻⁹ and 2⁻¹². Tolerance of the output, absolute plus relative, for values of unit variance
    and sizes up to 900, against float64 on the CPU: 1e-5 in float32, 4e-3 in bfloat16 and 5e-4 in float16; that is
    less than half the error of an additive bias in half precision. The GPU's kernels have not been compared yet.
    """

    @staticmethod
    def attend(
        query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor, scale: float | None = None, **options: Any
    ) -> Tensor:
        """query, key, value: (B, H, L, d) -> (B, H, L, d)"""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        carried = carry(query, key, value, attn_mask, scale)
        return F.scaled_dot_product_attention(*carried, scale=scale, **options)[..., : value.shape[-1]]


class Masked(AttentionMask):
    """A mask of tokens that carries gradients, with which a learned method trains; attention is explicit then.

    Attributes:
        mask: (B, L), of the keys.
        bias: (B, 1, 1, L), of the keys; None: none.
        masking: how the mask enters.
        pair: queries and keys, (B, H, L, d) each, once attention has run.
        map: attention probabilities, (B, H, L, L), likewise.
    """

    mask: Tensor
    bias: Tensor | None
    masking: "Masking"
    pair: tuple[Tensor, Tensor] | None = None
    map: Tensor

    @staticmethod
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: "Masked",
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """query, key, value: (B, H, L, d) -> (B, H, L, d)"""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        with torch.autocast(query.device.type, enabled=False):
            logits = query.float() @ key.float().mT * scale
            logits = logits if attn_mask.bias is None else logits + attn_mask.bias
            masking = attn_mask.masking
            attn_mask.map = masked_softmax(logits, attn_mask.mask, masking.epsilon, masking.keeps_self)
        attn_mask.pair = query, key
        return F.dropout(attn_mask.map, dropout_p).to(value.dtype) @ value


class Ahead(AttentionMask):
    """Lets merged tokens reuse the attention of the tokens that they were made of (MCTF, section 3.3).

    That map, merged along both sides, never has to be there: a merged key counts with all its members, and a merged
    query takes the mean of its own.

    Attributes:
        pair: queries and keys of the tokens before the merge, (B, H, L, d) each, as they are multiplied.
        mask: of them, or None.
        step: the merge of the tokens behind the first ones.
        prefix: number of those.
    """

    pair: tuple[Tensor, Tensor]
    mask: Tensor | None
    step: Reduction
    prefix: int

    @staticmethod
    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: "Ahead", **options: Any) -> Tensor:
        """value: (B, H, L', d) -> (B, H, L', d); query and key, those of merged tokens, do not count."""
        step, front, mask = attn_mask.step, attn_mask.prefix, attn_mask.mask

        def on_patches(change: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            flat = x.transpose(1, 2).flatten(2)
            flat = torch.cat([flat[:, :front], change(flat[:, front:])], dim=1)
            return flat.unflatten(2, (x.shape[1], -1)).transpose(1, 2)

        attend = type(mask).attend if isinstance(mask, AttentionMask) else F.scaled_dot_product_attention
        query, key = (x.to(value.dtype) for x in attn_mask.pair)
        out = attend(query, key, on_patches(step.unmerge, value), attn_mask=mask, **options)
        return on_patches(step.merge, out)


class Within(AttentionMask):
    """Lets packed tokens attend within their image.

    Attributes:
        packing: the `Packing`.
    """

    packing: "Packing"

    @staticmethod
    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: "Within",
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> Tensor:
        """query, key, value: (1, H, T, d) -> (1, H, T, d)"""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        attend = _in_one_kernel if query.device.type == "cuda" else _image_by_image
        return attend(query, key, value, attn_mask.packing, dropout_p, scale)


def carries(x: Tensor) -> bool:
    """Whether the bias of tokens is to go through channels: on a GPU, where attention runs in half precision.

    In float32 there is no flash kernel, and on the CPU more channels cost at least as much as an additive bias, which
    takes 3 to 6 % of attention (ViT-S, 420 to 785 tokens).
    """
    if x.device.type != "cuda":
        return False
    return (torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype) in HALF


def can_pack(x: Tensor, dropout: float = 0.0) -> bool:
    """Whether attention runs within the images of a packed sequence, where these tokens are.

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
    has_kernel = HAS_VARLEN and torch.backends.cuda.flash_sdp_enabled()
    return has_kernel and not dropout and carries(x) and torch.cuda.get_device_capability(x.device) >= (8, 0)


def _image_by_image(
    query: Tensor, key: Tensor, value: Tensor, packing: "Packing", dropout: float, scale: float
) -> Tensor:
    """(1, H, T, d), laid out as (1, T, H, d), as timm goes on with it."""
    images = (x.split(packing.lengths, dim=2) for x in (query, key, value))
    bias, none = packing.bias, [None] * len(packing.lengths)
    biases: Sequence[Any] = none if bias is None else bias.to(query.dtype).split(packing.lengths, dim=3)
    outputs = [
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale).transpose(1, 2)
        for q, k, v, mask in zip(*images, biases, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _in_one_kernel(
    query: Tensor, key: Tensor, value: Tensor, packing: "Packing", dropout: float, scale: float
) -> Tensor:
    """(1, H, T, d); the kernel takes no bias, so it goes through channels."""
    assert not dropout
    width = value.shape[-1]
    query, key, value = carry(query, key, value, packing.bias, scale)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    starts, longest = packing.starts, max(packing.lengths)
    output: Any = varlen_attn(q, k, v, starts, starts, longest, longest, scale=scale)
    return output[..., :width].transpose(0, 1).unsqueeze(0)


def carry(
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
