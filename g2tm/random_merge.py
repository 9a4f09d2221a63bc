"""Random merging: the baseline that any rule for choosing tokens has to beat."""

import torch
from torch import Tensor

from g2tm.reduction import Grouping
from g2tm.selection import batch_and_length
from g2tm.validation import check_tokens

WORD = 2**32 - 1


def random_merge(x: Tensor, *, tokens: int, seed: int, sizes: Tensor | None = None) -> Grouping:
    """Merge random tokens into random others; those that stay are in their old order.

    x, tokens, sizes: see `g2tm`. The same seed merges the same positions in every image, on every device.
    """
    n_images, n_tokens = batch_and_length(x)
    check_tokens(tokens, 1, n_tokens)
    position = torch.arange(n_tokens, device=x.device)
    chance = _mixed(_mixed(position) ^ _mixed(torch.full_like(position, seed & WORD)))  # no two are equal
    order = chance.argsort()
    stay, leave = order[:tokens].sort().values, order[tokens:]
    target = position.scatter(0, leave, stay[_mixed(chance[leave]) % tokens])
    return Grouping.of_targets(target.repeat(n_images, 1), stay.repeat(n_images, 1), sizes)


def _mixed(number: Tensor) -> Tensor:
    """A hash of numbers from 0 to 2³² - 1, int64, onto such numbers: one to one, and the same on every device."""
    number = (number ^ (number >> 16)) * 0x21F0AAAD & WORD  # "lowbias32" of the search for hashes by C. Wellons
    number = (number ^ (number >> 15)) * 0x735A2D97 & WORD
    return number ^ (number >> 15)
