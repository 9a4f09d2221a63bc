"""How every selection runs: without gradients, and in float32 whatever surrounds it."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

# Similarities that are held at once, in numbers: bounds the memory of long sequences.
MAX_SIMILARITIES = 2**24
LOWEST = float("-inf")  # similarity of what may not be chosen

P = ParamSpec("P")
R = TypeVar("R")


def selection(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Decorator of a function of tokens, (B, N, D) first: no gradients, and no autocast.

    Similarities in bfloat16 change partitions; autocast would compute them so even from float32 tokens.
    """

    @wraps(function)
    def select(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad():
            if not torch.is_autocast_enabled(x.device.type):
                return function(x, *args, **kwargs)
            with torch.autocast(x.device.type, enabled=False):
                return function(x, *args, **kwargs)

    return select


def precise(x: Tensor) -> Tensor:
    """In the precision that tokens are compared and averaged in: float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def images_in(x: Tensor) -> int:
    """Number of images of x, (B, ...); in an export a symbol, so that the exported model takes any number."""
    return x.shape[0] if torch.compiler.is_exporting() else int(x.shape[0])


def extent(x: Tensor) -> tuple[int, int]:
    """Images and tokens of x, (B, N, ...), as numbers; in an export symbols, where they vary."""
    return images_in(x), x.shape[1] if torch.compiler.is_exporting() else int(x.shape[1])


def surely(condition: Any) -> bool:
    """Whether a condition on lengths holds; False in an export, where lengths that the image decides are symbols."""
    if not torch.compiler.is_exporting():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # slow to import, and new

    return guard_or_false(condition)


def repeated(number: int, n_images: int) -> list[int]:
    """A number for every image; in an export, where these are not counted, one stands for all."""
    return [number] * (1 if torch.compiler.is_exporting() else n_images)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Tokens at the given positions: (B, N, D), (B, M) -> (B, M, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last axis: two (..., D) of one dtype, without gradients -> (...).

    NumPy's need no matrix of all products on the CPU.
    """
    if numpy_helps(a):
        return torch.from_numpy(np.asarray(np.vecdot(a.detach().numpy(), b.detach().numpy())))
    return torch.linalg.vecdot(a, b)


def square_sums(x: Tensor) -> Tensor:
    """Squared lengths of the vectors on the last axis: (..., D), without gradients -> (...)."""
    return products(x, x) if numpy_helps(x) else x.square().sum(-1)


def itself(product: Tensor, first: int) -> Tensor:
    """Where tokens meet themselves in the products (B, i, J) of some of them, from `first` on, with all: (i, J)."""
    position = torch.arange(product.shape[2], device=product.device)
    return position == position[first : first + product.shape[1], None]


def places(mask: Tensor, count: int) -> Tensor:
    """Positions of the true ones, (B, N), bool, `count` in every row, ascending: (B, count). Nothing to wait for."""
    return mask.logical_not().argsort(dim=1, stable=True)[:, :count]


def ranks(values: Tensor) -> Tensor:
    """Place of every number of its row, (B, K), the largest first, from 0; of equal ones the first comes first."""
    order = values.argsort(dim=1, descending=True, stable=True)
    places = torch.arange(values.shape[1], device=values.device)
    return torch.empty_like(order).scatter_(1, order, places.expand_as(order))


def first_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values, indices) of the largest number of the last axis, of equal ones the first; NaN is the largest.

    x: (..., K), without gradients. NumPy's is ten times as fast on the CPU.
    """
    if numpy_helps(x):
        indices = torch.from_numpy(np.asarray(x.detach().numpy().argmax(-1)))
        return x.gather(-1, indices.unsqueeze(-1)).squeeze(-1), indices
    return x.max(dim=-1)


def chunks(a: Tensor, columns: int) -> Iterator[Tensor]:
    """Parts of (B, I, D) along I, whose products with so many columns may be held at once; at least one."""
    if torch.compiler.is_exporting():  # nobody knows how many images there will be
        yield a
        return
    yield from a.split(max(1, MAX_SIMILARITIES // max(len(a) * columns, 1)), dim=1)


def most_similar(a: Tensor, b: Tensor, change: Callable[[Tensor, int], object] | None = None) -> tuple[Tensor, Tensor]:
    """The b with the largest inner product for every a, never all products at once.

    Args:
        a, b: (B, I, D) and (B, J, D).
        change: is given the products of some a, (B, i, J), and the index of the first of them; changes them in place,
            sets those that do not count to -inf.

    Returns:
        (values, indices), (B, I) each; of equal ones the first, and NaN is the largest.
    """
    transposed, best, first = b.transpose(1, 2), [], 0
    for part in chunks(a, b.shape[1]):
        product = part @ transposed
        if change is not None:
            change(product, first)
        best.append(first_maximum(product))
        first += part.shape[1]
    if len(best) == 1:
        return best[0]
    values, indices = zip(*best, strict=True)
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)


def numpy_helps(x: Tensor) -> bool:
    """On the CPU, unless torch.compile looks on, which has loops of its own, or a trace, in which operations count."""
    return x.device.type == "cpu" and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
