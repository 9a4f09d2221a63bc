"""What `torch.onnx.export` has to be told of merged models."""

from typing import Any

import torch

HAS_ATTENTION = OPSET = 23  # the first version of ONNX's operators with one for attention
BOOL, INT32 = 9, 6  # ONNX's numbers of types


def onnx_options(opset: int = OPSET) -> dict[str, Any]:
    """Keyword arguments with which `torch.onnx.export` takes a merged model, of whatever family.

    torch.onnx.export(model, (images,), "model.onnx", **patch.onnx_options())

    A model in float16 becomes a file in float16, in which the similarities by which tokens merge stay in float32; so
    call `model.half()` before, in place of a conversion of the file.

    Args:
        opset: version of ONNX's operators, from 18; before 23 attention is written as products and a softmax.
    """
    own: dict[Any, Any] = {torch.ops.aten.sort.stable: _stable_sort}
    if opset >= HAS_ATTENTION:
        own[torch.ops.aten.scaled_dot_product_attention.default] = _attention
    return {"dynamo": True, "opset_version": opset, "custom_translation_table": own, "verbose": False}


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


def _length(op: Any, x: Any, axis: int) -> Any:
    """The size of an axis as ONNX's (1,): a constant where it is known, which compilers want."""
    size = x.shape[axis]
    return op.Constant(value_ints=[size]) if isinstance(size, int) else op.Shape(x, start=axis, end=axis + 1)
