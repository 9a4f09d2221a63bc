"""A trained Segmenter as an ONNX file, with the merge inside of the graph, checked in ONNX Runtime."""

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

import patch
from patch.exporting import OPSET
from patch.trials import interleaved_trials, speed
from segm.checkpoint import checkpoint_file
from segm.cli import Images, checkpoint_argument, im_size_option, markdown, max_images_option
from segm.errors import one_line
from segm.eval.evaluate import Views
from segm.merging import MergingCommand
from segm.model.segmenter import Segmenter
from segm.onnx_model import KEY, MISSING, OnnxModel, Record
from segm.run import Run
from segm.storage import atomic

OUTPUTS: dict[str, Callable[[Segmenter, Tensor], Tensor]] = {
    "scores": lambda model, images: model.grid_logits(images),
    "logits": lambda model, images: model(images),
    "labels": lambda model, images: model(images).argmax(1),
}
CPU = torch.device("cpu")
AGREEMENT = 99.9  # percent of the pixels: less is no rounding any more
N_COMPARED, N_TIMED, N_CALIBRATION = 16, 4, 32  # images
PYTORCH = "PyTorch"
COLUMNS = {
    "model": "{name}",
    "MiB": "{size:.1f}",
    "images/s (ratio)": "{images_per_second:.2f} ({ratio:.2f})",
    "largest difference": "{difference}",
    "same labels, %": "{agreement:.2f}",
}


@click.command(cls=MergingCommand)
@checkpoint_argument
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write to this file.  [default: model.onnx in the run]",
)
@click.option(
    "--output",
    type=click.Choice(OUTPUTS),
    default="scores",
    show_default=True,
    help="Output of the graph: class logits per patch, logits per pixel, or the label map.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), help="Take a fixed number of images per pass.  [default: any number]"
)
@click.option(
    "--opset",
    type=click.IntRange(18, OPSET),
    default=OPSET,
    show_default=True,
    help="Version of ONNX's operators; give an older one for compilers that do not know the newest.",
)
@click.option("--float16", is_flag=True, help="Also write the model in float16, which GPUs are fast with.")
@click.option("--int8", is_flag=True, help="Also write the model in int8, quantized dynamically and statically.")
@click.option(
    "--images",
    type=Images(),
    metavar="DATASET|FOLDER",
    help="Images to check on, and those that static quantization takes its ranges from.  [default: the run's data set]",
)
@im_size_option
@max_images_option
def main(
    checkpoint: Path,
    out: Path | None,
    output: str,
    batch_size: int | None,
    opset: int,
    float16: bool,
    int8: bool,
    images: str | Path | None,
    im_size: int | None,
    max_images: int | None,
    merging: dict[str, Any],
) -> None:
    """Write CHECKPOINT as an ONNX file, with the merge inside of the graph, and compare it with PyTorch.

    The file takes normalized images (B, 3, H, W) of the size of the run's windows. inference.py, test.py and miou.py
    read it. Methods that go by a number of tokens (--tokens, --r) have fixed shapes throughout; with a threshold, the
    tokens after the merge are as many as the image with most of them keeps. All models are timed on the CPU,
    interleaved. Ratios are those to PyTorch without merging.
    """
    run = Run.load(checkpoint, device=CPU, merging=merging, im_size=im_size, amp=False)
    out = out or checkpoint_file(checkpoint).parent / "model.onnx"
    samples = run.views(images).samples  # before a minute of exporting: a missing data set is named
    export(run, out, output, batch_size, opset)
    files = {"ONNX Runtime, float32": out}
    if float16:
        files["ONNX Runtime, float16"] = out.with_name(f"{out.stem}_float16.onnx")
        export(run, files["ONNX Runtime, float16"], output, batch_size, opset, float16=True)
    for kind in ("dynamic", "static") if int8 else ():
        files[f"ONNX Runtime, int8, {kind}"] = out.with_name(f"{out.stem}_int8_{kind}.onnx")
        calibration = _calibration(run, images) if kind == "static" else None
        quantize(out, files[f"ONNX Runtime, int8, {kind}"], calibration)
    models = {name: OnnxModel(file) for name, file in files.items()}
    views = Views(samples, run.windows.size, run.normalization, max_images, batch_size=batch_size or 1)
    rows = compare(run, models, views, output)
    in_float32 = 4 * sum(tensor.numel() for tensor in run.model.parameters())
    for row in rows:
        row["size"] = (files[row["name"]].stat().st_size if row["name"] in files else in_float32) / 2**20
    columns = dict(COLUMNS)
    if not isinstance(images, Path) and output != "labels":
        columns["mIoU"] = "{mean_iou:.2f}"
        runs = {f"{PYTORCH}, pure": run.unpatched(), f"{PYTORCH}, {run.method}": run}
        runs |= {name: replace(run, model=model) for name, model in models.items()}
        for row in tqdm(rows, desc="scores", unit="model", leave=False):
            row["mean_iou"] = runs[row["name"]].evaluate(dataset=images, n_images=max_images)["mean_iou"]
    sides = " × ".join(map(str, (3 if run.bands is None else len(run.bands), *run.windows.size)))
    source = checkpoint_file(checkpoint).name
    click.echo(f"{out}: {source} as ONNX, opset {opset}, images {batch_size or 'B'} × {sides}")
    click.echo(markdown(columns, rows))
    agreement = next(row["agreement"] for row in rows if row["name"] in files)
    if agreement < AGREEMENT:
        raise ValueError(f"{out} gives other labels than PyTorch, only {agreement:.2f} % are the same: do not use it")


def compare(run: Run, models: Mapping[str, OnnxModel], views: Views, output: str) -> list[dict[str, Any]]:
    """Speed of exported models and of PyTorch's, and how far they differ from the latter."""
    pure, own = run.unpatched().model, run.model
    calls: dict[str, Callable[[Tensor], Tensor]] = {f"{PYTORCH}, pure": lambda x: OUTPUTS[output](pure, x)}
    if run.method != "pure":
        calls[f"{PYTORCH}, {run.method}"] = lambda x: OUTPUTS[output](own, x)
    reference = list(calls.values())[-1]
    calls |= {name: model.run for name, model in models.items()}
    step = max(len(views) // N_COMPARED, 1)
    compared = [views[index] for index in range(0, len(views), step)][:N_COMPARED]
    trials = interleaved_trials(calls, compared[:N_TIMED], CPU, warm=True, progress=True)
    first = speed(trials[f"{PYTORCH}, pure"])
    rows = []
    for name, call in tqdm(calls.items(), desc="differences", unit="model", leave=False):
        largest, agreement = differences(call, reference, compared, output)
        own_speed = speed(trials[name])
        rows.append({"name": name, "images_per_second": own_speed, "ratio": own_speed / first})
        rows[-1] |= {"difference": "" if largest is None else f"{largest:.1e}", "agreement": agreement}
    return rows


@torch.inference_mode()
def differences(
    call: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], images: list[Tensor], output: str
) -> tuple[float | None, float]:
    """The largest difference of two outputs (None: they are labels), and how many labels are the same, percent."""
    largest, same = [], []
    for batch in images:
        ours, theirs = call(batch), reference(batch)
        if output != "labels":
            largest.append((ours - theirs).abs().max().item())
            ours, theirs = ours.argmax(1), theirs.argmax(1)
        same.append((ours == theirs).double().mean().item())
    return max(largest, default=None), 100 * sum(same) / len(same)


def _calibration(run: Run, images: str | Path | None) -> list[Tensor]:
    """Images that the ranges of activations are taken from: of the training split, or photographs."""
    samples = run.views(images, split="train").samples
    return list(Views(samples, run.windows.size, run.normalization, N_CALIBRATION))


# ------------------------------------------------------------------------------------------- the graph


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
        output: see `segm.onnx_model.Record`.
        batch_size: images per pass; None: any number.
        opset: version of ONNX's operators; before 23 attention is written as products and a softmax.
        float16: whether it computes so; images and output are in float32, and so are similarities, which tokens merge
            by.

    Raises:
        ValueError: ONNX is not installed, or has no words for the model.
        OSError: it cannot be written.
    """
    size, merging = run.windows.size, run.merging
    model = copy.deepcopy(run.model).half() if float16 else run.model
    program = convert(model, size, output, batch_size, opset)
    patch_size = run.model.patch_size if output == "scores" else (1, 1)
    source = checkpoint_file(run.path).name
    record = Record(run.name, run.config.to_variant(), run.im_size, size, output, merging, patch_size, source)
    program.model.metadata_props[KEY] = record.dump()
    with atomic(file) as part:
        program.save(part)


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
    may_trace = getattr(model, "tracing", nullcontext)()  # its shapes may depend on the image
    # In inference mode operations arrive in one piece; and a choice between kernels would ask for a length.
    computing = torch.inference_mode(False), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), may_trace
    quiet = redirect_stdout(StringIO()), redirect_stderr(StringIO())  # PyTorch's exporter may print a whole graph
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of types and versions inside of the exporters
        for context in (*computing, *quiet):
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
    n_bands = graph.model.encoder.patch_embed.proj.in_channels
    images = torch.zeros(batch_size or 2, n_bands, *size)  # of one image alone, the number would count as fixed
    shapes = None if batch_size else {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(graph, (images,), dynamic_shapes=shapes, strict=False)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["output"]}
    found = torch.onnx.export(program, dynamo=True, **names, **patch.onnx_options(opset))
    assert found is not None  # it is without a file to write
    return found


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
        quant_pre_process(file, prepared, skip_symbolic_shape=True, auto_merge=True)
        own: dict[str, Any] = {"nodes_to_quantize": _linear_layers(prepared), "per_channel": True}
        if calibration is None:
            quantize_dynamic(prepared, part, weight_type=QuantType.QInt8, **own)
            return
        batches = ({"images": images.numpy()} for images in calibration)
        reader: Any = SimpleNamespace(get_next=partial(next, batches, None))
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(prepared, part, reader, **types, **own)


def _linear_layers(file: Path) -> list[str]:
    """Names of the products with weights: those of activations alone, in attention and similarities, stay float32."""
    import onnx

    graph = onnx.load(file, load_external_data=False).graph
    weights = {one.name for one in graph.initializer}
    return [node.name for node in graph.node if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights]


if __name__ == "__main__":
    main()
