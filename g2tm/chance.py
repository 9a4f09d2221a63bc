"""Random merging: the baseline that any rule for choosing tokens has to beat."""

import numpy as np
import torch
from torch import Tensor

from g2tm.reduction import Grouping
from g2tm.selection import extent
from g2tm.validation import check_tokens


def random_merge(x: Tensor, *, tokens: int, seed: int, sizes: Tensor | None = None) -> Grouping:
    """Merge random tokens into random others until exactly so many are left.

    Args:
        x: (B, N, D), patch tokens.
        tokens: how many are left in every image.
        seed: the same seed merges the same positions in every image, whatever the device.
        sizes: (B, N), patches that each token carries; None: one each.

    Returns:
        A `Grouping`; tokens that stay are in their old order.

    Raises:
        ValueError: a number of tokens that the images have not.
    """
    n_images, n_tokens = extent(x)
    check_tokens(tokens, 1, n_tokens)
    generator = np.random.default_rng(seed)
    order = generator.permutation(n_tokens)
    stay, leave = np.sort(order[:tokens]), order[tokens:]
    target = np.arange(n_tokens)
    target[leave] = generator.choice(stay, len(leave))
    targets, survivors = (torch.from_numpy(found).to(x.device).repeat(n_images, 1) for found in (target, stay))
    return Grouping.of_targets(targets, survivors, sizes)
