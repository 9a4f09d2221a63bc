"""Operations of a model in fvcore's convention."""

import math
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore imports parts of torch.jit that are on their way out
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import get_shape


@dataclass(frozen=True)
class Operations:
    """10⁹ operations of one forward pass per image, one per multiply-add.

    Attributes:
        total: all of them.
        encoder, decoder: those of the two parts; what merges tokens is part of the encoder. What is left is the
            undoing of the merge, upsampling, and the weighing of masks by their classes.
        uncounted: operator -> how often it ran without being counted: element-wise work, sorting, indexing.
    """

    total: float
    encoder: float
    decoder: float
    uncounted: Mapping[str, int]


def count_operations(model: nn.Module, images: Tensor) -> Operations:
    """Operations of one forward pass; for a merging model the count depends on the images.

    fvcore counts matrix products, convolutions, layer norms and interpolation. Added are fused attention (its two
    matrix products), the similarities of neighbors and the sums of the merge. Connected components are searched
    outside PyTorch and do no arithmetic.

    Args:
        model: a Segmenter or a ViT, patched or not.
        images: (B, 3, H, W).

    Returns:
        `Operations` per image, upsampling included. A ViT without a decoder is all encoder.
    """
    # A patched model lets itself be traced only where it is told that nothing will run again.
    with torch.inference_mode(), getattr(model, "tracing", nullcontext)():
        analysis = FlopCountAnalysis(_WithSelection(model), images)
        analysis.set_op_handle(**{f"aten::{name}": handle for name, handle in _HANDLES.items()})
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        parts = analysis.by_module()
        total, own = parts[""], {part: parts.get(f"model.{part}", 0) for part in ("encoder", "decoder")}
        own["encoder"] = own["encoder"] or total
        uncounted = {name.removeprefix("aten::"): n for name, n in sorted(analysis.unsupported_ops().items())}
    total, encoder, decoder = (count / len(images) / 1e9 for count in (total, *own.values()))
    return Operations(total, encoder, decoder, uncounted)


class _WithSelection(nn.Module):
    """Gives back what a model computes only to choose tokens: tracing would drop it, since no output depends on it
    once the components are found outside PyTorch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        with _Keep() as kept:
            output = self.model(images)
        return output, *kept.results


class _Keep(TorchFunctionMode):
    """Collects the results of the functions with which tokens are compared."""

    def __init__(self) -> None:
        super().__init__()
        self.results: list[Tensor] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.linalg.vecdot, torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.results.append(result)
        return result


def _attention(inputs: Any, outputs: Any) -> int:
    """The two matrix products of attention, as fvcore counts them where they are explicit."""
    queries, keys, values = (get_shape(value) for value in inputs[:3])
    *batch, n_queries, width = queries
    return math.prod(batch) * n_queries * keys[-2] * (width + values[-1])


def _similarities(inputs: Any, outputs: Any) -> int:
    """A product of every pair of vectors."""
    return math.prod(get_shape(inputs[0]))


def _sums(position: int) -> Callable[[Any, Any], int]:
    """One addition per number that is summed; position: which input holds the numbers."""
    return lambda inputs, outputs: math.prod(get_shape(inputs[position]))


_HANDLES = {
    "scaled_dot_product_attention": _attention,
    "linalg_vecdot": _similarities,
    "index_add": _sums(3),
    "scatter_add_": _sums(3),
}
