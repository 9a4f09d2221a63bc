"""From a trained Segmenter to an ONNX file, with the merge inside of the graph."""

import logging
import warnings
from collections.abc import Callable, Iterable
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from segm.errors import one_line
from segm.exported import KEY, MISSING, Record
from segm.files import atomic
from segm.model.segmenter import Segmenter
from segm.run import Run

HAS_ATTENTION = OPSET = 23  # the first version of ONNX's operators with one for attention
OUTPUTS: dict[str, Callable[[Segmenter, Tensor], Tensor]] = {
    "scores": lambda model, images: model.grid_logits(images),
    "logits": lambda model, images: model(images),
    "labels": lambda model, images: model(images).argmax(1),
}
BOOL, INT32 = 9, 6  # ONNX's numbers of types


class _Graph(nn.Module):
    """What is exported of a Segmenter."""

    def __init__(self, model: Segmenter, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, images: Tensor) -> Tensor:
        return OUTPUTS[self.output](self.model, images)


def export(run: Run, file: Path, output: str = "scores", batch_size: int | None = None, opset: int = OPSET) -> None:
    """Write a run as an ONNX file.

    Images have the size of the run's windows. With a method whose number of tokens is fixed, all shapes are, but for
    the batch; with a threshold, the tokens are as many as the image with most of them keeps, as in PyTorch.

    Args:
        run: on the CPU, patched or not.
        file: to write.
        output: see `segm.exported.Record`.
        batch_size: images per pass; None: any number.
        opset: version of ONNX's operators; before 23 attention is written as products and a softmax.

    Raises:
        ValueError: ONNX is not installed, or has no words for the model.
        OSError: it cannot be written.
    """
    size, merging = run.windows.size, run.merging
    program = convert(run.model, size, output, batch_size, opset)
    record = Record(run.name, run.config.to_variant(), run.im_size, size, output, merging)
    program.model.metadata_props[KEY] = record.dump()
    with atomic(file) as part:
        program.save(part)


def convert(
    model: Segmenter,
    size: tuple[int, int],
    output: str = "scores",
    batch_size: int | None = None,
    opset: int = OPSET,
) -> torch.onnx.ONNXProgram:
    """A model as ONNX's graph: "images" (B, 3, height, width), normalized, to "output".

    Args:
        model: on the CPU, in evaluation mode, patched or not.
        size: (height, width) of the images, pixels.
        output, batch_size, opset: see `export`.

    Raises:
        ValueError: as `export`.
    """
    if any(find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")):
        raise ValueError(MISSING)
    may_trace = getattr(model, "tracing", nullcontext)()  # its shapes may depend on the image
    # In inference mode operations arrive in one piece; and a choice between kernels would ask for a length.
    contexts: list[Any] = [torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), may_trace]
    contexts += [redirect_stdout(StringIO()), redirect_stderr(StringIO())]  # PyTorch's exporter may print a whole graph
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of types and versions inside of the exporters
        for context in contexts:
            stack.enter_context(context)
        logging.disable(logging.CRITICAL)  # and log it
        try:
            return _converted(_Graph(model, output), size, batch_size, opset)
        except Exception as error:  # the exporters raise many kinds
            raise ValueError(
                "this model cannot be exported, choose a method with a fixed number of tokens, or none: "
                f"{one_line(error.__cause__ or error)}"
            ) from error
        finally:
            logging.disable(logging.NOTSET)


def _converted(graph: _Graph, size: tuple[int, int], batch_size: int | None, opset: int) -> torch.onnx.ONNXProgram:
    images = torch.zeros(batch_size or 2, 3, *size)  # of one image alone, the number would count as fixed
    shapes = None if batch_size else {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(graph, (images,), dynamic_shapes=shapes, strict=False)
    options: dict[str, Any] = {"input_names": ["images"], "output_names": ["output"], "opset_version": opset}
    own: dict[Any, Any] = {torch.ops.aten.sort.stable: _stable_sort}
    if opset >= HAS_ATTENTION:
        own[torch.ops.aten.scaled_dot_product_attention.default] = _attention
    options |= {"custom_translation_table": own, "verbose": False}
    found = torch.onnx.export(program, dynamo=True, **options)
    assert found is not None  # it is without a file to write
    return found


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


# ---------------------------------------------------------------------------------------------- int8


def quantize(file: Path, out: Path, calibration: Iterable[Tensor] | None = None) -> None:
    """Write an exported model with its linear layers in int8.

    Args:
        file: exported, float32.
        out: to write.
        calibration: images (B, 3, H, W), normalized, from which the ranges of activations are taken once and for all
            (static quantization); None: they are found in every pass (dynamic quantization).

    Raises:
        OSError: it cannot be written.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as folder, atomic(out) as part:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(file, prepared, skip_symbolic_shape=True, auto_merge=True)
        own: dict[str, Any] = {"nodes_to_quantize": _linear_layers(prepared), "per_channel": True}
        if calibration is None:
            quantize_dynamic(prepared, part, weight_type=QuantType.QInt8, **own)
            return
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, part, _Reader(calibration), quant_format=QuantFormat.QDQ, **types, **own)


def _linear_layers(file: Path) -> list[str]:
    """Names of the products with weights: those of activations alone, in attention and similarities, stay float32."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    weights = {one.name for one in graph.initializer}
    return [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights]


class _Reader:
    """Images as ONNX Runtime's calibration reads them."""

    def __init__(self, images: Iterable[Tensor]) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, or None at the end."""
        batch = next(self.images, None)
        return None if batch is None else {"images": batch.numpy()}
