"""Random choices, the baselines of any rule: tokens that merge, and the token that stands for its group."""

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
    chance = _chance(position, seed)
    order = chance.argsort()
    stay, leave = order[:tokens].sort().values, order[tokens:]
    target = position.scatter(0, leave, stay[_mixed(chance[leave]) % tokens])
    return Grouping.of_targets(target.repeat(n_images, 1), stay.repeat(n_images, 1), sizes)


def random_members(groups: Grouping, seed: int) -> Grouping:
    """The same groups, each carried by one of its tokens at random in place of their mean (ALGM, table 6).

    Tokens that count nothing in the mean, as padding does, are not chosen. The same seed chooses the same tokens, on
    every device.
    """
    counts = groups.all_weights > 0
    chance = _chance(torch.arange(counts.shape[1], device=counts.device), seed)
    chance = torch.where(counts, chance, WORD + 1)
    lowest = chance.new_full((counts.shape[0], groups.width), WORD + 1)
    lowest = lowest.scatter_reduce(1, groups.assignment, chance, "amin")
    return groups.weighted((chance == lowest.gather(1, groups.assignment)) & counts)


def _chance(position: Tensor, seed: int) -> Tensor:
    """A random number for every position, no two of which are equal."""
    return _mixed(_mixed(position) ^ _mixed(torch.full_like(position, seed & WORD)))


def _mixed(number: Tensor) -> Tensor:
    """A hash of numbers from 0 to 2³² - 1, int64, onto such numbers: one to one, and the same on every device."""
    number = (number ^ (number >> 16)) * 0x21F0AAAD & WORD  # "lowbias32" of the search for hashes by C. Wellons
    number = (number ^ (number >> 15)) * 0x735A2D97 & WORD
    return number ^ (number >> 15)
