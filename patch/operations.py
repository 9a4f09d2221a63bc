"""Operations of one forward pass of a model, patched or not."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop

aten = torch.ops.aten


@dataclass(frozen=True)
class Operations:
    """10⁹ operations of one forward pass per image, one per multiply-add.

    Attributes:
        total: all of them.
        encoder, decoder: those of the two parts; merging is part of the encoder, its undoing of the decoder. The rest
            is upsampling, and the weighing of masks by their classes.
        uncounted: operator -> number of its calls that do not count: element-wise work, sorting, indexing.
    """

    total: float
    encoder: float
    decoder: float
    uncounted: Mapping[str, int]


def count_operations(model: nn.Module, images: Tensor) -> Operations:
    """Operations of one forward pass; for a merging model the count depends on the images.

    PyTorch's formulas give matrix products, convolutions and fused attention. As fvcore does, norms count 5 per number
    (batch norms 2) and bilinear interpolation 4 per pixel. The similarities of neighbors and the sums of the merge
    count one per number. Connected components are searched outside PyTorch and do no arithmetic.

    Args:
        model: a Segmenter or a ViT, patched or not.
        images: (B, 3, H, W). Where no image decides what is computed, model and images may be on the device "meta".

    Returns:
        `Operations` per image, upsampling included. A ViT without a decoder is all encoder.
    """
    counter = _OperationCounter()
    decoder = getattr(model, "decoder", None)
    parts = [part for part in (decoder, getattr(decoder, "neck", None)) if isinstance(part, nn.Module)]
    with torch.inference_mode(), ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.register_forward_pre_hook(lambda *_: counter.enter("decoder")))
            stack.enter_context(part.register_forward_hook(lambda *_: counter.enter("rest")))
        stack.enter_context(counter)
        model(images)
    found = {part: count / len(images) / 1e9 for part, count in counter.operations.items()}
    uncounted = dict(sorted(counter.uncounted.items()))
    return Operations(sum(found.values()), found.get("encoder", 0.0), found.get("decoder", 0.0), uncounted)


class _OperationCounter(TorchDispatchMode):
    """While open, counts the operations of a model: those before its decoder, in it, and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.part = "encoder"

    def enter(self, part: str) -> None:
        """From now on "decoder" runs, or the "rest"."""
        self.part = part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, operator = kwargs or {}, func.overloadpacket
        if operator not in FORMULAS:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if operator in FORMULAS:
            self.operations[self.part] += FORMULAS[operator](*args, **kwargs, out_val=result)
        elif not func.is_view:
            self.uncounted[operator.__name__] += 1
        return result


def _library(formula: Callable[..., int]) -> Callable[..., int]:
    """PyTorch's formula, which counts two per multiply-add."""
    return lambda *args, **kwargs: formula(*args, **kwargs) // 2


def _per_number(position: int, factor: int = 1) -> Callable[..., int]:
    """So many operations per number of an argument."""
    return lambda *args, **_: factor * args[position].numel()


FORMULAS: dict[Any, Callable[..., int]] = {
    **{operator: _library(formula) for operator, formula in flop_registry.items()},
    aten._scaled_dot_product_flash_attention_for_cpu: _library(sdpa_flop),
    **dict.fromkeys((aten.native_layer_norm, aten.native_group_norm), _per_number(0, 5)),
    **dict.fromkeys((aten.native_batch_norm, aten.cudnn_batch_norm), _per_number(0, 2)),
    aten._native_batch_norm_legit_no_training: _per_number(0, 2),
    **dict.fromkeys((aten._adaptive_avg_pool2d, aten.linalg_vecdot), _per_number(0)),
    **dict.fromkeys((aten.index_add, aten.index_add_, aten.scatter_add, aten.scatter_add_), _per_number(3)),
    aten.upsample_bilinear2d: lambda *_, out_val, **__: 4 * out_val.numel(),
    aten.upsample_nearest2d: lambda *_, out_val, **__: out_val.numel(),
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: x.numel() * weight.shape[0]
