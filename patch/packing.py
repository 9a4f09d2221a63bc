"""Images that kept different numbers of tokens, behind each other instead of padded to the longest."""

import inspect

import torch
import torch.nn.functional as F
from torch import nn

from patch.flash import AttentionMask, carries, carry

try:
    from torch.nn.attention.varlen import varlen_attn

    HAS_VARLEN = "scale" in inspect.signature(varlen_attn).parameters
except ImportError:
    HAS_VARLEN = False


def can_pack(x, dropout=0.0):
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


class Packing:
    """Where the T tokens of a batch stand that is padded to L per image, and where once they are packed.

    Args:
        reduction: from the patches to the tokens, padded.
        before, after: tokens in front of and behind the patch tokens of every image.
        bias: (B, 1, 1, M), of the patch tokens as keys; None: none.

    Attributes:
        shape: (B, L).
        lengths: B numbers that sum to T.
        starts: (B + 1,), int32, where each image begins, and the end of the last.
        bias: (1, 1, 1, T), float32, or None.
    """

    def __init__(self, reduction, before, after, bias):
        kept = F.pad(~reduction.padding, (before, after), value=True)
        self.shape = kept.shape
        self.lengths = [before + length + after for length in reduction.lengths]
        total = sum(self.lengths)
        self.places = kept.flatten().cumsum(0) - 1  # (B·L,), in the packed sequence; padding repeats what it follows
        position = torch.arange(len(self.places), device=kept.device)
        rows = position.new_empty(total + 1)  # not by `nonzero`, which waits for the device
        rows.scatter_(0, torch.where(kept.flatten(), self.places, total), position)
        self.rows = rows[:total]  # (T,), in the padded batch
        self.starts = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
        self.bias = None if bias is None else F.pad(bias, (before, after)).flatten()[self.rows].view(1, 1, 1, -1)

    def pack(self, x):
        """(B, L, D) -> (1, T, D)"""
        return x.flatten(0, 1).index_select(0, self.rows).unsqueeze(0)

    def unpack(self, x):
        """(1, T, D) -> (B, L, D); what stands in the padding means nothing."""
        return x.squeeze(0).index_select(0, self.places).unflatten(0, self.shape)

    def drop(self, drop_path, x):
        """Stochastic depth, which leaves out whole images; x: (1, T, D)."""
        if isinstance(drop_path, nn.Identity) or not drop_path.training:
            return x
        factors = drop_path(x.new_ones(self.shape[0], 1, 1)).flatten()
        return x * factors[self.rows // self.shape[1]].unsqueeze(-1)

    @property
    def mask(self):
        """What `scaled_dot_product_attention` is handed as `attn_mask`."""
        mask = torch.empty(0).as_subclass(Within)
        mask.packing = self
        return mask


class Within(AttentionMask):
    """Lets packed tokens attend within their image.

    Attributes:
        packing: the `Packing`.
    """

    @staticmethod
    def attend(query, key, value, attn_mask, dropout_p=0.0, is_causal=False, scale=None):
        """query, key, value: (1, H, T, d) -> (1, H, T, d)"""
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        attend = _in_one_kernel if query.device.type == "cuda" else _image_by_image
        return attend(query, key, value, attn_mask.packing, dropout_p, scale)


def _image_by_image(query, key, value, packing, dropout, scale):
    """(1, H, T, d), laid out as (1, T, H, d), as timm goes on with it."""
    images = zip(*(x.split(packing.lengths, dim=2) for x in (query, key, value)), strict=True)
    n_images = len(packing.lengths)
    bias = packing.bias
    biases = [None] * n_images if bias is None else bias.to(query.dtype).split(packing.lengths, dim=3)
    outputs = [
        F.scaled_dot_product_attention(*qkv, attn_mask=mask, dropout_p=dropout, scale=scale).transpose(1, 2)
        for qkv, mask in zip(images, biases, strict=True)
    ]
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _in_one_kernel(query, key, value, packing, dropout, scale):
    """(1, H, T, d); the kernel takes no bias, so it goes through channels."""
    assert not dropout
    width = value.shape[-1]
    query, key, value = carry(query, key, value, packing.bias, scale)
    tokens = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    longest = max(packing.lengths)
    output = varlen_attn(*tokens, packing.starts, packing.starts, longest, longest, scale=scale)
    return output[..., :width].transpose(0, 1).unsqueeze(0)
