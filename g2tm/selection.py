"""Helpers of every selection, which runs without gradients and autocast: precision, shapes, order."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:
    from functools import cached_property as cached
else:

    class cached(Generic[R]):  # noqa: N801 - used like `property`
        """`functools.cached_property` without the lock that it takes on Python 3.11, at which Dynamo breaks a graph."""

        def __init__(self, compute: Callable[[Any], R]) -> None:
            self.compute, self.name, self.__doc__ = compute, compute.__name__, compute.__doc__

        def __get__(self, instance: Any, owner: type | None = None) -> R:
            if instance is None:
                return self
            value = self.compute(instance)
            setattr(instance, self.name, value)  # from now on found in front of this descriptor
            return value


def selection(function: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Decorator of a function of tokens, (B, N, D) first: no gradients, and no autocast.

    Similarities in bfloat16 change partitions; autocast would compute them so even from float32 tokens.
    """

    @wraps(function)
    def select(x: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad(), without_autocast(x):
            return function(x, *args, **kwargs)

    return select


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """A context in which no operation on tensors of this device is cast."""
    device = x.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):  # the meta device knows no autocast
        return nullcontext()
    return torch.autocast(device, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """In the precision that tokens are compared and averaged in: float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def images_in(x: Tensor) -> int:
    """Number of images of x, (B, ...); in an export a symbol, so that the exported model takes any number."""
    return x.shape[0] if torch.compiler.is_exporting() else int(x.shape[0])


def batch_and_length(x: Tensor) -> tuple[int, int]:
    """Images and tokens of x, (B, N, ...), as numbers; in an export symbols, where they vary."""
    return images_in(x), x.shape[1] if torch.compiler.is_exporting() else int(x.shape[1])


def statically_true(condition: Any) -> bool:
    """Return whether a condition on lengths holds; False in an export, if symbols cannot tell."""
    if not torch.compiler.is_exporting():
        return bool(condition)
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # slow to import, and new

    return guard_or_false(condition)


def same_for_all(number: int, n_images: int) -> list[int]:
    """A number for every image; in an export, where these are not counted, one stands for all."""
    return [number] * (1 if torch.compiler.is_exporting() else n_images)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Tokens at the given positions: (B, N, D), (B, M) -> (B, M, D)."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def own_positions(x: Tensor) -> Tensor:
    """Every token's own position: (B, N, ...) -> (B, N), int64, in memory of its own."""
    n_images, n_tokens = batch_and_length(x)
    return torch.arange(n_tokens, device=x.device).repeat(n_images, 1)


def true_positions(mask: Tensor, count: int) -> Tensor:
    """Positions of the true ones, (B, N), bool, `count` in every row, ascending: (B, count). Nothing to wait for."""
    return mask.logical_not().argsort(dim=1, stable=True)[:, :count]


def falling(values: Tensor) -> Tensor:
    """Positions of a row's numbers, (B, K), from the largest on; of equal ones the first comes first."""
    return values.argsort(dim=1, descending=True, stable=True)


def ranks(values: Tensor) -> Tensor:
    """Place of every number of its row, (B, K), in the order of `falling`, from 0."""
    return inverse(falling(values))


def inverse(order: Tensor) -> Tensor:
    """The permutations that undo those of the rows of `order`, (B, K)."""
    places = torch.arange(order.shape[1], device=order.device)
    return torch.empty_like(order).scatter_(1, order, places.expand_as(order))


def tokens_in(x: Tensor, padding: Tensor | None) -> Tensor:
    """Number of tokens of x, (B, N, ...), that are no padding, see `g2tm`: (B,), int64."""
    n_images, n_tokens = batch_and_length(x)
    return torch.full((n_images,), n_tokens, device=x.device) if padding is None else (~padding).sum(1)


def or_ones(numbers: Tensor | None, like: Tensor) -> Tensor:
    """Sizes or weights, in float32; None stands for 1 each, in the shape of `like`."""
    return torch.ones_like(like, dtype=torch.float32) if numbers is None else numbers.float()


def numpy_helps(x: Tensor) -> bool:
    """Return whether NumPy is faster: on the CPU, unless something intercepts PyTorch's operators, which does not see
    NumPy's: torch.compile, which has loops of its own, a trace, `torch.func`, or a counter of operations."""
    intercepted = torch.compiler.is_compiling() or torch.jit.is_tracing() or is_in_torch_dispatch_mode()
    return x.device.type == "cpu" and not intercepted and not torch._C._are_functorch_transforms_active()


def is_vmapped(x: Tensor) -> bool:
    """Return whether `torch.func.vmap` hides a dimension of x, so that its values cannot be read."""
    functorch = torch._C._functorch
    while not torch.compiler.is_compiling() and functorch.is_functorch_wrapped_tensor(x):
        if functorch.is_batchedtensor(x):
            return True
        x = functorch.get_unwrapped(x)
    return False
