"""The matrix products of a pass by themselves: the part of a saving that the machine's libraries can realize."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "aten::convolution", "mkldnn::_linear_pointwise")
ATTENTION = "aten::_scaled_dot_product"  # the fused kernels, each with a name of its own


class _Recorder(TorchDispatchMode):
    """While open, notes every matrix product, convolution and fused attention with stand-ins for its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._stand_ins: dict[tuple[Any, ...], Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        if name in PRODUCTS or name.startswith(ATTENTION):
            own = tree_map_only(Tensor, self._stand_in, (args, kwargs or {}))
            self.calls.append((func, *own))
        return func(*args, **(kwargs or {}))

    def _stand_in(self, x: Tensor) -> Tensor:
        """A weight itself, or a random tensor, which all tensors of one shape and strides share."""
        if isinstance(x, torch.nn.Parameter) or (x._base is not None and isinstance(x._base, torch.nn.Parameter)):
            return x
        key = (x.shape, x.stride(), x.dtype, x.device)
        if key not in self._stand_ins:
            self._stand_ins[key] = torch.randn_like(x)
        return self._stand_ins[key]


def products_alone(call: Callable[[Tensor], Any], images: Tensor) -> Callable[[], None]:
    """A function that repeats the matrix products of one pass, attention included, and nothing else of it.

    Its speed on a merged model against that on a pure one bounds the speed-up of a pass: where it gains less than the
    operations, the libraries multiply smaller matrices more slowly.

    Args:
        call: a model or one of its parts.
        images: (B, 3, H, W).
    """
    recorder = _Recorder()
    # In inference mode a linear layer would arrive as one, not as its product.
    with torch.inference_mode(False), torch.no_grad(), recorder:
        call(images)

    def repeat() -> None:
        for func, args, kwargs in recorder.calls:
            func(*args, **kwargs)

    return repeat
