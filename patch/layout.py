"""The layout of the tokens of a batch while blocks work on them: in rows, or concatenated.

A pass decides for each block (`Track.arrange`); everything that depends on it is here: what attention is handed as a
mask, the rotary embedding of the tokens, and stochastic depth.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from g2tm import Reduction, attention_bias
from g2tm.selection import cached
from patch.attention import AttentionMask, BlockDiagonal, SizeBias, SoftMaskAttention, SoftMasking, bias_in_channels

Around = tuple[int, int]


@dataclass(eq=False)
class Tokens:
    """The patch tokens of a pass between two merges.

    Attributes:
        reduction: from all patches to them; None while nothing was merged.
        grid: (gh, gw), patches of the images.
        attention: mode, see `g2tm.attention_bias`.
        soft_mask: (B, M), of a training form with masks, 1 for the tokens that count; None before its first step.
        soft_masking: how that mask enters attention; None: there is none.
        width: M, how many there are in a row.
    """

    reduction: Reduction | None
    grid: tuple[int, int] | None
    attention: str
    soft_mask: Tensor | None = None
    soft_masking: SoftMasking | None = None
    width: int = 0

    @cached
    def padding(self) -> Tensor | None:
        """(B, M), bool, True for slots that hold no token; None: there is no padding."""
        return None if self.reduction is None else self.reduction.padding

    @property
    def smaller_grid(self) -> tuple[int, int] | None:
        """(h, w), where the tokens are a smaller grid of the image; None: they are not."""
        return getattr(self.reduction, "grid", None)

    @cached
    def key_bias(self) -> Tensor | None:
        """(B, 1, 1, M), added to the logits of the patch tokens as keys; None: nothing is."""
        return None if self.reduction is None else attention_bias(self.reduction.sizes, self.attention, self.padding)

    @cached
    def positions(self) -> Tensor:
        """(B, M), the patch whose rotary embedding each token has, see `representatives`."""
        assert self.reduction is not None and self.grid is not None
        return representatives(self.reduction, self.grid)


class Rows:
    """Every image has its row, (B, before + M + after, D), padded to the longest.

    Args:
        tokens: the patch tokens.
        n_around: number of tokens before and after the patch tokens of every image.
    """

    def __init__(self, tokens: Tokens, n_around: Around) -> None:
        self.tokens, self.n_around = tokens, n_around
        self._rotary: tuple[Tensor, Tensor] | None = None

    @property
    def length(self) -> int:
        """L"""
        return self.tokens.width + sum(self.n_around)

    @cached
    def bias(self) -> Tensor | None:
        """(B, 1, 1, L), float32, of all tokens as keys, in rows; None: nothing is added."""
        return None if self.tokens.key_bias is None else F.pad(self.tokens.key_bias, self.n_around)

    def lay(self, x: Tensor) -> Tensor:
        """Tokens in rows, (B, L, ...), laid out so."""
        return x

    def rows(self, x: Tensor) -> Tensor:
        """Tokens that are laid out so, in rows: (B, L, ...)."""
        return x

    def mask(self, x: Tensor, fused: bool) -> AttentionMask | Tensor | None:
        """The mask of the next attention.

        Args:
            x: the tokens that attend, (B, L, D).
            fused: whether attention hands the mask to `scaled_dot_product_attention`.

        Raises:
            ValueError: a training form with masks, where attention is not fused.
        """
        masking = self.tokens.soft_masking
        if masking is not None:
            if not fused:
                raise ValueError("a training form with masks takes fused attention: set fused_attn = True")
            counts = x.new_ones(x.shape[:2])
            if self.tokens.soft_mask is not None:
                counts = F.pad(self.tokens.soft_mask, self.n_around, value=1.0)
            return SoftMaskAttention(counts, self.bias, masking)
        if self.bias is None:
            return None
        return SizeBias(self.bias) if fused and bias_in_channels(x) else self.bias.to(x.dtype)

    def rotary(self, table: Tensor | None) -> Tensor | None:
        """Rotary embedding of the current tokens, each that of its representative.

        Args:
            table: (N, 2d) or (H, N, 2d), sine and cosine of every patch, or of the smaller grid that is left; None: the
                model has none.

        Returns:
            The table itself while nothing was merged, or where a grid is left; then (B, 1 or H, M, 2d), or concatenated
            (1, 1 or H, T - P, 2d).
        """
        if table is None or self.tokens.reduction is None or self.tokens.smaller_grid is not None:
            return table
        if self._rotary is None or self._rotary[0] is not table:
            per_head = table if table.ndim == 3 else table.unsqueeze(0)
            self._rotary = table, self._lay_rotary(per_head[:, self.tokens.positions].transpose(0, 1))
        return self._rotary[1]

    def _lay_rotary(self, table: Tensor) -> Tensor:
        return table

    def drop(self, drop_path: nn.Module, x: Tensor) -> Tensor:
        """Stochastic depth, which leaves out whole images; x: laid out so."""
        return drop_path(x)


class Packed(Rows):
    """The T tokens of all images are concatenated, (1, T, D), in place of padding each to the longest.

    Attributes:
        shape: (B, L), of the rows.
        lengths: B numbers that sum to T.
        starts: (B + 1,), int32, where each image begins, and the end of the last.
    """

    def __init__(self, tokens: Tokens, n_around: Around) -> None:
        super().__init__(tokens, n_around)
        reduction = tokens.reduction
        assert reduction is not None and tokens.padding is not None
        kept = F.pad(~tokens.padding, n_around, value=True)
        self.shape = kept.shape
        self.lengths = [sum(n_around) + length for length in reduction.lengths]
        total = sum(self.lengths)
        # (B·L,), places in the concatenation; padding repeats what it follows.
        self._places = kept.flatten().cumsum(0) - 1
        position = torch.arange(len(self._places), device=kept.device)
        in_rows = position.new_empty(total + 1)  # not by `nonzero`, which waits for the device
        in_rows.scatter_(0, torch.where(kept.flatten(), self._places, total), position)
        self._in_rows = in_rows[:total]  # (T,), places in the padded rows
        self.starts = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()

    @property
    def length(self) -> int:
        """T"""
        return sum(self.lengths)

    @cached
    def packed_bias(self) -> Tensor | None:
        """(1, 1, 1, T), float32, of all tokens as keys; None: nothing is added."""
        reduction: Any = self.tokens.reduction
        bias = attention_bias(reduction.sizes, self.tokens.attention)
        return None if bias is None else F.pad(bias, self.n_around).flatten()[self._in_rows].view(1, 1, 1, -1)

    def lay(self, x: Tensor) -> Tensor:
        """(B, L, ...) -> (1, T, ...)"""
        return x.flatten(0, 1).index_select(0, self._in_rows).unsqueeze(0)

    def rows(self, x: Tensor) -> Tensor:
        """(1, T, ...) -> (B, L, ...); what stands in the padding means nothing."""
        return x.squeeze(0).index_select(0, self._places).unflatten(0, self.shape)

    def mask(self, x: Tensor, fused: bool) -> AttentionMask:
        """A mask that keeps attention within the images."""
        return BlockDiagonal(self.lengths, self.starts, self.packed_bias)

    def _lay_rotary(self, table: Tensor) -> Tensor:
        """(B, H, M, 2d) -> (1, H, T - P, 2d). The prefix tokens of the first image are left to the model; those of
        the others get a rotation by nothing."""
        before = self.n_around[0]
        sine, cosine = table.chunk(2, dim=-1)
        padding = 0, 0, before, 0
        rows = torch.cat([F.pad(sine, padding), F.pad(cosine, padding, value=1.0)], dim=-1).transpose(1, 2)
        return self.lay(rows).transpose(1, 2)[:, :, before:]

    def drop(self, drop_path: nn.Module, x: Tensor) -> Tensor:
        """Stochastic depth, which leaves out whole images; x: (1, T, D)."""
        if isinstance(drop_path, nn.Identity) or not drop_path.training:
            return x
        factors = drop_path(x.new_ones(self.shape[0], 1, 1)).flatten()
        return x * factors[self._in_rows // self.shape[1]].unsqueeze(-1)


def representatives(reduction: Reduction, grid: tuple[int, int]) -> Tensor:
    """The patch that stands for every token where a position is asked for.

    That is the member nearest to the group's centroid on the grid, of equally near ones the first. Tokens that are no
    groups of patches are samples of the sequence, and stand where they were taken.

    Args:
        reduction: from the patches to the tokens.
        grid: (gh, gw).

    Returns:
        (B, M), int64, patches in row-major order; 0 for padding.
    """
    n_patches, device = grid[0] * grid[1], reduction.counts.device
    patch = torch.arange(n_patches, device=device)
    assignment: Tensor | None = getattr(reduction, "assignment", None)
    if assignment is None:
        n_images, width = reduction.sizes.shape
        samples = ((2 * torch.arange(width, device=device) + 1) * n_patches).div(2 * width, rounding_mode="floor")
        return samples.expand(n_images, -1)
    zeros = assignment.new_zeros(reduction.sizes.shape)
    members = zeros.scatter_add(1, assignment, torch.ones_like(assignment))
    # In integers, multiplied by the number of members: nearness is exact, and so are ties.
    distance = torch.zeros_like(assignment)
    for place in (patch // grid[1], patch % grid[1]):
        place = place.expand_as(assignment)
        total = zeros.scatter_add(1, assignment, place)
        distance += (place * members.gather(1, assignment) - total.gather(1, assignment)).square()
    key = distance * n_patches + patch
    far = torch.full_like(zeros, torch.iinfo(torch.int64).max)
    return far.scatter_reduce(1, assignment, key, "amin").where(members > 0, zeros) % n_patches
