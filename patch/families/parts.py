"""The way through a block under `torch.compile` where the image decides how many tokens are left."""

import torch
from torch import Tensor

from patch.families.base import PatchedBlock, vary
from patch.layout import Rows
from patch.look import Look
from patch.track import Track

BREAKS = "the image decides how many tokens are left: give tokens=... for one graph, or leave out fullgraph"


@torch.compiler.disable(recursive=False, reason=BREAKS)
def run_in_parts(block: PatchedBlock, track: Track, x: Tensor, rope: Tensor | None) -> Tensor:
    """`PatchedBlock.run` under `torch.compile` where the image decides how many tokens are left: the halves of a block
    are compiled, the same for all blocks; what is between them is not, since it differs from block to block."""
    x, layout, rotary = _arranged("before", block, track, x, rope)
    x, look = block.attend(x, layout, rotary)
    x, layout, _ = _arranged("attention", block, track, x, None, look)
    return _left(block, track, block.feed(x, layout), look)


@torch.compiler.disable
def _arranged(
    place: str, block: PatchedBlock, track: Track, x: Tensor, rope: Tensor | None, look: Look | None = None
) -> tuple[Tensor, Rows, Tensor | None]:
    """The tokens, their layout, and the rotary table for the next half of a block; all that it asks is known."""
    track.keeps_rows = True  # the lengths of concatenated images would be compiled anew for every batch
    x = track.resume(x, block) if place == "before" else x
    x, layout = track.arrange(track.merge_at(place, x, block, look), block)
    rotary = track.rotary_table(rope, block._patch.index)
    layout.rotary(rotary)
    for known, axis in ((x, 1), (track.tokens.key_bias, 3), (layout.bias, 3)):
        vary(known, axis)
    return x, layout, rotary


@torch.compiler.disable
def _left(block: PatchedBlock, track: Track, x: Tensor, look: Look | None) -> Tensor:
    x = track.leave(track.merge_at("block", x, block, look), block)
    vary(x, 1)
    return x
