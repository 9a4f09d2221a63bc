"""Options of `torch.onnx.export` for merged models."""

from typing import Any

import torch

HAS_ATTENTION = OPSET = 23  # the first version of ONNX's operators with one for attention
BOOL, INT32 = 9, 6  # ONNX's numbers of types


def onnx_options(opset: int = OPSET) -> dict[str, Any]:
    """Keyword arguments with which `torch.onnx.export` takes a merged model, of whatever family.

    torch.onnx.export(model, (images,), "model.onnx", dynamo=True, **patch.onnx_options())

    A model in float16 becomes a file in float16, in which the similarities by which tokens merge stay in float32; so
    call `model.half()` before, in place of a conversion of the file.

    Args:
        opset: version of ONNX's operators, from 18; before 23 attention is written as products and a softmax.
    """
    aten: Any = torch.ops.aten
    own: dict[Any, Any] = {
        aten.sort.stable: _stable_sort,
        aten.scatter_add.default: _scatter_add,
        aten.scatter_reduce.two: _scatter_reduce,
    }
    if opset >= HAS_ATTENTION:
        own[aten.scaled_dot_product_attention.default] = _attention
    return {"opset_version": opset, "custom_translation_table": own, "verbose": False}


def _stable_sort(x: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """`torch.sort(stable=True)`, which PyTorch's exporter lacks: TopK of all numbers, of equal ones the first."""
    from onnxscript import opset18

    op: Any = opset18  # its types know no variables
    every = _length(op, x, dim % len(x.shape))
    is_bool = x.dtype == BOOL
    values, indices = op.TopK(op.Cast(x, to=INT32) if is_bool else x, every, axis=dim, largest=int(descending))
    return op.Cast(values, to=BOOL) if is_bool else values, indices


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *, is_causal: bool = False, scale: float | None = None
) -> Any:
    """Attention with a mask of one row for all queries, which ONNX Runtime does not repeat by itself."""
    from onnxscript import opset23

    op: Any = opset23
    if attn_mask is not None:
        one = op.Constant(value_ints=[1])
        attn_mask = op.Expand(attn_mask, op.Concat(one, one, _length(op, query, 2), one, axis=0))
    return op.Attention(query, key, value, attn_mask, is_causal=int(is_causal), scale=scale)[0]


def _scatter_add(x: Any, dim: int, index: Any, src: Any) -> Any:
    return _scatter(x, dim, index, src, "add")


def _scatter_reduce(x: Any, dim: int, index: Any, src: Any, reduce: str, include_self: bool = True) -> Any:
    assert include_self
    return _scatter(x, dim, index, src, {"sum": "add", "amin": "min", "amax": "max"}[reduce])


def _scatter(x: Any, dim: int, index: Any, src: Any, reduction: str) -> Any:
    """ScatterElements into as many places as there are indices: TensorRT refuses fewer."""
    from onnxscript import opset18

    op: Any = opset18
    sizes = x.shape[dim], index.shape[dim]
    more = sizes[1] - sizes[0] if all(isinstance(size, int) for size in sizes) else 0
    if more <= 0:
        return op.ScatterElements(x, index, src, axis=dim, reduction=reduction)
    axis, (first, end, room) = op.Constant(value_ints=[dim]), (op.Constant(value_ints=[n]) for n in (0, sizes[0], more))
    wide = op.Pad(x, op.Concat(first, room, axis=0), None, axis)
    return op.Slice(op.ScatterElements(wide, index, src, axis=dim, reduction=reduction), first, end, axis)


def _length(op: Any, x: Any, axis: int) -> Any:
    """The size of an axis as ONNX's (1,): a constant where it is known, which compilers want."""
    size = x.shape[axis]
    return op.Constant(value_ints=[size]) if isinstance(size, int) else op.Shape(x, start=axis, end=axis + 1)
