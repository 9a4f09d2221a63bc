"""A Segmenter as a file for runtimes, with the merge inside of the graph: ONNX, or a compiled package."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import patch
from patch.exporting import OPSET
from segm.checkpoint import checkpoint_file
from segm.config import FLOAT32, INT8
from segm.errors import one_line
from segm.exported import KEY, MISSING, PACKAGE, Record
from segm.model.segmenter import Segmenter
from segm.run import Run
from segm.storage import atomic

N_CALIBRATION = 32  # images that static quantization takes its ranges from
OUTPUTS: dict[str, Callable[[Segmenter, Tensor], Tensor]] = {
    "scores": lambda model, images: model.grid_logits(images),
    "logits": lambda model, images: model(images),
    "labels": lambda model, images: model(images).argmax(1),
}


class _Graph(nn.Module):
    """A Segmenter, of whatever precision, as a function from images to one of `OUTPUTS`, both in float32."""

    def __init__(self, model: Segmenter, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, images: Tensor) -> Tensor:
        found = OUTPUTS[self.output](self.model, images.to(next(self.model.parameters()).dtype))
        return found if self.output == "labels" else found.float()


def export(
    run: Run,
    file: Path,
    output: str = "scores",
    batch_size: int | None = None,
    opset: int = OPSET,
    float16: bool = False,
) -> None:
    """Write a run as an ONNX file.

    Images have the size of the run's windows. With a method whose number of tokens is fixed, all shapes are, but for
    the batch; with a threshold, the tokens are as many as the image with most of them keeps, as in PyTorch.

    Args:
        run: on the CPU, patched or not.
        file: to write.
        output: see `segm.exported.Record`.
        batch_size: images per pass; None: any number.
        opset: version of ONNX's operators; before 23 attention is written as products and a softmax.
        float16: whether it computes so; images and output are in float32, and so are similarities, which tokens merge
            by.

    Raises:
        ValueError: ONNX is not installed, or has no words for the model.
        OSError: it cannot be written.
    """
    model = copy.deepcopy(run.model).half() if float16 else run.model
    program = convert(model, run.windows.size, output, batch_size, opset)
    precision = "float16" if float16 else FLOAT32
    program.model.metadata_props[KEY] = _record(run, output, batch_size, precision).dump()
    with atomic(file) as part:
        program.save(part)


def package(run: Run, file: Path, output: str = "scores", batch_size: int | None = None) -> None:
    """Compile a run ahead of time (`torch.export`, AOTInductor) for the processor of this machine.

    Args:
        run, output, batch_size: see `export`.
        file: to write, `.pt2`.

    Raises:
        ValueError: the model cannot be exported, or there is no C++ compiler.
        OSError: it cannot be written.
    """
    with _exporting(run.model, nullcontext()), TemporaryDirectory() as folder, atomic(file) as part:
        program = _program(run.model, run.windows.size, output, batch_size)
        metadata = {"aot_inductor.metadata": {KEY: _record(run, output, batch_size, FLOAT32).dump()}}
        made = Path(folder) / f"made{PACKAGE}"  # the compiler wants this ending
        torch._inductor.aoti_compile_and_package(program, package_path=str(made), inductor_configs=metadata)
        part.write_bytes(made.read_bytes())


def convert(
    model: Segmenter, size: tuple[int, int], output: str = "scores", batch_size: int | None = None, opset: int = OPSET
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
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["output"]}
    # A choice between kernels would ask for a length.
    with _exporting(model, sdpa_kernel(SDPBackend.MATH)):
        program = _program(model, size, output, batch_size)
        found = torch.onnx.export(program, dynamo=True, **names, **patch.onnx_options(opset))
    assert found is not None  # it is without a file to write
    return found


@contextmanager
def _exporting(model: Segmenter, kernels: AbstractContextManager[Any]) -> Iterator[None]:
    """While open, a model can be exported, in silence; what goes wrong is a ValueError in one line."""
    may_trace = getattr(model, "tracing", nullcontext)()  # its shapes may depend on the image
    # In inference mode operations arrive in one piece.
    computing = torch.inference_mode(False), torch.no_grad(), kernels, may_trace
    quiet = redirect_stdout(StringIO()), redirect_stderr(StringIO())  # PyTorch's exporter may print a whole graph
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of types and versions inside of the exporters
        for context in (*computing, *quiet):
            stack.enter_context(context)
        logging.disable(logging.CRITICAL)  # and log it
        try:
            yield
        except OSError:
            raise
        except Exception as error:  # the exporters raise many kinds
            raise ValueError(
                "this model cannot be exported, choose a method with a fixed number of tokens, or none: "
                f"{one_line(error.__cause__ or error)}"
            ) from error
        finally:
            logging.disable(logging.NOTSET)


def _program(
    model: Segmenter, size: tuple[int, int], output: str, batch_size: int | None
) -> torch.export.ExportedProgram:
    graph = _Graph(model, output)
    n_bands = model.encoder.patch_embed.proj.in_channels
    images = torch.zeros(batch_size or 2, n_bands, *size)  # of one image alone, the number would count as fixed
    shapes = None if batch_size else {"images": {0: torch.export.Dim("batch", min=1)}}
    return torch.export.export(graph, (images,), dynamic_shapes=shapes, strict=False)


def _record(run: Run, output: str, batch_size: int | None, precision: str) -> Record:
    patch_size = run.model.patch_size if output == "scores" else (1, 1)
    trained = run.name, run.config.to_variant(), run.im_size, run.windows.size
    source = checkpoint_file(run.path).name
    return Record(*trained, output, run.merging, patch_size, source, batch_size, precision)


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
    from onnxruntime.quantization import QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as folder, atomic(out) as part:
        prepared = Path(folder) / "prepared.onnx"
        # Of a fixed batch, products with a bias would become Gemm, which dynamic quantization leaves as it is.
        how: dict[str, Any] = {"skip_optimization": calibration is None, "auto_merge": True}
        quant_pre_process(file, prepared, skip_symbolic_shape=True, **how)
        own: dict[str, Any] = {"nodes_to_quantize": _prepare(prepared), "per_channel": True}
        if calibration is None:
            quantize_dynamic(prepared, part, weight_type=QuantType.QInt8, **own)
            return
        batches = ({"images": images.numpy()} for images in calibration)
        reader: Any = SimpleNamespace(get_next=partial(next, batches, None))
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, part, reader, **types, **own)


def _prepare(file: Path) -> list[str]:
    """Note the precision in the record of a file. Return the names of products with weights: those of activations
    alone, in attention and similarities, stay float32."""
    import onnx

    model = onnx.load(file)
    graph = model.graph
    for entry in model.metadata_props:
        if entry.key == KEY:
            entry.value = replace(Record.parse(entry.value), precision=INT8).dump()
    onnx.save(model, file)
    weights = {one.name for one in graph.initializer}
    return [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights]
