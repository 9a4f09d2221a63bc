"""How every selection runs: without gradients, and in float32 whatever surrounds it."""

from functools import wraps

import torch


def selection(function):
    """Decorator of a function of tokens, (B, N, D) first: no gradients, and no autocast.

    Similarities in bfloat16 change partitions; autocast would compute them so even from float32 tokens.
    """

    @wraps(function)
    def select(x, *args, **kwargs):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return select
