"""How every selection runs: without gradients, and in float32 whatever surrounds it."""

from functools import wraps

import numpy as np
import torch


def selection(function):
    """Decorator of a function of tokens, (B, N, D) first: no gradients, and no autocast.

    Similarities in bfloat16 change partitions; autocast would compute them so even from float32 tokens.
    """

    @wraps(function)
    def select(x, *args, **kwargs):
        with torch.no_grad():
            if not torch.is_autocast_enabled(x.device.type):
                return function(x, *args, **kwargs)
            with torch.autocast(x.device.type, enabled=False):
                return function(x, *args, **kwargs)

    return select


def products(a, b):
    """Inner products over the last axis: two (..., D) of one dtype, without gradients -> (...).

    NumPy's need no matrix of all products on the CPU.
    """
    if _numpy_may_help(a):
        return torch.from_numpy(np.asarray(np.vecdot(a.detach().numpy(), b.detach().numpy())))
    return torch.linalg.vecdot(a, b)


def square_sums(x):
    """Squared lengths of the vectors on the last axis: (..., D), without gradients -> (...)."""
    return products(x, x) if _numpy_may_help(x) else x.square().sum(-1)


def first_maximum(x):
    """(values, indices) of the largest number of the last axis, of equal ones the first; NaN is the largest.

    x: (..., K), without gradients. NumPy's is ten times as fast on the CPU.
    """
    if _numpy_may_help(x):
        indices = torch.from_numpy(np.asarray(x.detach().numpy().argmax(-1)))
        return x.gather(-1, indices.unsqueeze(-1)).squeeze(-1), indices
    return x.max(dim=-1)


def _numpy_may_help(x):
    """On the CPU, unless torch.compile looks on, which has loops of its own, or a trace, in which operations count."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
