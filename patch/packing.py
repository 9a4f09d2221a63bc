"""Images that kept different numbers of tokens, concatenated instead of padded to the longest."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g2tm import Reduction
from patch.attention import Within


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

    def __init__(self, reduction: Reduction, before: int, after: int, bias: Tensor | None) -> None:
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

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (1, T, ...)"""
        return x.flatten(0, 1).index_select(0, self.rows).unsqueeze(0)

    def unpack(self, x: Tensor) -> Tensor:
        """(1, T, ...) -> (B, L, ...); what stands in the padding means nothing."""
        return x.squeeze(0).index_select(0, self.places).unflatten(0, self.shape)

    def drop(self, drop_path: nn.Module, x: Tensor) -> Tensor:
        """Stochastic depth, which leaves out whole images; x: (1, T, D)."""
        if isinstance(drop_path, nn.Identity) or not drop_path.training:
            return x
        factors = drop_path(x.new_ones(self.shape[0], 1, 1)).flatten()
        return x * factors[self.rows // self.shape[1]].unsqueeze(-1)

    @property
    def mask(self) -> Within:
        """What `scaled_dot_product_attention` is handed as `attn_mask`."""
        return Within.of(packing=self)
