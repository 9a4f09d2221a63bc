"""A trained Segmenter as a file for runtimes, with the merge in the graph, compared with PyTorch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from patch.exporting import OPSET
from patch.trials import interleaved_trials, speed
from segm import tensorrt
from segm.checkpoint import checkpoint_file
from segm.cli import Images, Listed, checkpoint_argument, im_size_option, markdown, max_images_option
from segm.config import BFLOAT16, FLOAT32
from segm.eval.evaluate import Views
from segm.exported import INDUCTOR, ONNX_RUNTIME, OPENVINO, PACKAGE, RUNTIMES, ExportedModel, check_installed
from segm.exporting import N_CALIBRATION, OUTPUTS, export, package, quantize
from segm.merging import PURE, MergingCommand
from segm.precision import Precision, computes_bfloat16
from segm.run import Run

CPU = torch.device("cpu")
AGREEMENT = 99.9  # percent of the pixels: less is no rounding any more
N_COMPARED, N_TIMED = 16, 4  # images
NAMES = {ONNX_RUNTIME: "ONNX Runtime", OPENVINO: "OpenVINO", INDUCTOR: "AOTInductor"}
FLOAT16, DYNAMIC, STATIC = "float16", "int8, dynamic", "int8, static"
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
    "--runtime",
    "runtimes",
    type=Listed(str, lambda: RUNTIMES),
    default=ONNX_RUNTIME,
    show_default=True,
    help=f"Runtimes to compare: {', '.join(RUNTIMES)}. For {INDUCTOR}, also compile model{PACKAGE}, in minutes.",
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
    "--tensorrt",
    "for_tensorrt",
    is_flag=True,
    help="Refuse a graph that TensorRT would not take; the batch is fixed, 1 by default.",
)
@click.option("--with-pure", is_flag=True, help="Also export the model without merging, and compare it.")
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
    runtimes: Sequence[str],
    batch_size: int | None,
    opset: int,
    float16: bool,
    int8: bool,
    for_tensorrt: bool,
    with_pure: bool,
    images: str | Path | None,
    im_size: int | None,
    max_images: int | None,
    merging: dict[str, Any],
) -> None:
    """Write CHECKPOINT as an ONNX file, with the merge in the graph, and compare it with PyTorch.

    The file takes normalized images (B, 3, H, W) of the size of the run's windows. inference.py, test.py and miou.py
    read it. Methods that go by a number of tokens (--tokens, --r) have fixed shapes throughout; with a threshold, the
    tokens after the merge are as many as the image with most of them keeps. All models are timed on the CPU,
    interleaved. Ratios are those to PyTorch without merging; differences are those to PyTorch with the same merging.
    """
    run = Run.load(checkpoint, device=CPU, merging=merging, im_size=im_size, amp=False)
    out = out or checkpoint_file(checkpoint).parent / "model.onnx"
    for runtime in runtimes:  # before a minute of exporting: what is missing is named, also a data set
        check_installed(runtime)
    samples = run.views(images).samples
    how = Export(output, runtimes, batch_size or (1 if for_tensorrt else None), opset, float16, int8, images)
    views = Views(samples, run.windows.size, run.normalization, max_images, batch_size=how.batch_size or 1)
    with TemporaryDirectory() as folder:
        candidates = [one for own in [run.unpatched()] + [run] * (run.method != PURE) for one in in_pytorch(own)]
        if with_pure and run.method != PURE:
            candidates += how.made(run.unpatched(), Path(folder) / "pure.onnx")
        candidates += how.made(run, out)
        if for_tensorrt:
            click.echo(tensorrt.check(out))
        rows = compare(candidates, views, output)
        columns = dict(COLUMNS)
        if not isinstance(images, Path) and output != "labels":
            columns["mIoU"] = "{mean_iou:.2f}"
            for row, one in zip(rows, tqdm(candidates, desc="scores", unit="model", leave=False), strict=True):
                row["mean_iou"] = one.run.evaluate(dataset=images, n_images=max_images)["mean_iou"]
    sides = " × ".join(map(str, (3 if run.bands is None else len(run.bands), *run.windows.size)))
    source = checkpoint_file(checkpoint).name
    click.echo(f"{out}: {source} as ONNX, opset {opset}, images {how.batch_size or 'B'} × {sides}")
    click.echo(markdown(columns, rows))
    for row, one in zip(rows, candidates, strict=True):
        if one.file is not None and one.precision == FLOAT32 and row["agreement"] < AGREEMENT:
            raise ValueError(
                f"{one.name} gives other labels than PyTorch, only {row['agreement']:.2f} % are the same: do not use "
                f"{one.file}"
            )


# ------------------------------------------------------------------------------------------------ what is compared


@dataclass(frozen=True)
class Candidate:
    """A model in a runtime.

    Attributes:
        name: in the table.
        run: to predict with.
        merging: in words; models with the same are compared.
        file: exported; None: it runs in PyTorch.
        precision: in which it computes.
    """

    name: str
    run: Run
    merging: str
    file: Path | None = None
    precision: str = FLOAT32

    def call(self, images: Tensor, output: str) -> Tensor:
        """Images (B, 3, H, W), normalized, to one of `OUTPUTS`."""
        if self.file is not None:
            return self.run.model.run(images)
        with self.run.precision.autocast():
            return OUTPUTS[output](self.run.model, images)

    @property
    def size(self) -> float:
        """MiB of the file; in PyTorch, of the parameters in float32."""
        in_float32 = 4 * sum(tensor.numel() for tensor in self.run.model.parameters())
        return (in_float32 if self.file is None else self.file.stat().st_size) / 2**20


def in_pytorch(run: Run, merging: str | None = None) -> list[Candidate]:
    """A run in PyTorch: in float32, and in bfloat16 where the processor computes in it; merging: None: its method."""
    merging = merging or run.method
    precisions = {FLOAT32: False} | ({BFLOAT16: True} if computes_bfloat16(CPU) else {})
    return [
        Candidate(f"PyTorch, {name}, {merging}", own, merging, precision=name)
        for name, amp in precisions.items()
        for own in [replace(run, precision=Precision.choose(CPU, amp))]
    ]


@dataclass(frozen=True)
class Export:
    """The files that are written of a run; the attributes are options of the command."""

    output: str
    runtimes: Sequence[str]
    batch_size: int | None
    opset: int
    float16: bool
    int8: bool
    images: str | Path | None

    def made(self, run: Run, out: Path, merging: str | None = None) -> list[Candidate]:
        """Write the files of a run and open them: ONNX in every precision that is asked for, and the package."""
        files, compiled = self._written(run, out), out.with_suffix(PACKAGE)
        if INDUCTOR in self.runtimes:
            package(run, compiled, self.output, self.batch_size)
        in_bfloat16 = {BFLOAT16: out} if computes_bfloat16(CPU) else {}
        with_ranges = {STATIC: files[STATIC]} if STATIC in files else {}  # the other one it would widen to float32
        by_runtime = {
            ONNX_RUNTIME: files,
            OPENVINO: {FLOAT32: out, **in_bfloat16, **with_ranges},
            INDUCTOR: {FLOAT32: compiled},
        }
        chosen = [(one, *entry) for one in self.runtimes for entry in by_runtime[one].items()]
        return [self._opened(run, merging or run.method, *entry) for entry in chosen]

    def _written(self, run: Run, out: Path) -> dict[str, Path]:
        """precision -> file, ONNX."""
        how = self.output, self.batch_size, self.opset
        files = {FLOAT32: out}
        export(run, out, *how)
        if self.float16:
            files[FLOAT16] = out.with_name(f"{out.stem}_float16.onnx")
            export(run, files[FLOAT16], *how, float16=True)
        for kind in (DYNAMIC, STATIC) if self.int8 else ():
            files[kind] = out.with_name(f"{out.stem}_{kind.replace(', ', '_')}.onnx")
            quantize(out, files[kind], self._calibration(run) if kind == STATIC else None)
        return files

    def _calibration(self, run: Run) -> Iterator[Tensor]:
        """Images that the ranges of activations are taken from: of the training split, or photographs."""
        samples, count = run.views(self.images, split="train").samples, self.batch_size or 1
        for images in Views(samples, run.windows.size, run.normalization, N_CALIBRATION, batch_size=count):
            yield images.repeat(-(-count // len(images)), 1, 1, 1)[:count]  # the last batch, too, is a full one

    def _opened(self, run: Run, merging: str, runtime: str, precision: str, file: Path) -> Candidate:
        in_bfloat16 = runtime == OPENVINO and precision != FLOAT32 and computes_bfloat16(CPU)  # beside int8, too
        model: Any = ExportedModel(file, CPU, runtime, in_bfloat16)
        name = f"{NAMES[runtime]}, {precision}, {merging}"
        return Candidate(name, replace(run, model=model), merging, file, precision)


def compare(candidates: Sequence[Candidate], views: Views, output: str) -> list[dict[str, Any]]:
    """Speed of models, interleaved, the plain one first, and how far they are from PyTorch's with the same merging."""
    step = max(len(views) // N_COMPARED, 1)
    compared = [views[index] for index in range(0, len(views), step)][:N_COMPARED]
    calls = {one.name: lambda images, one=one: one.call(images, output) for one in candidates}
    trials = interleaved_trials(calls, compared[:N_TIMED], CPU, warm=True, progress=True)
    plain = [one for one in candidates if (one.file, one.precision) == (None, FLOAT32)]
    references = {one.merging: calls[one.name] for one in plain}
    first = speed(trials[candidates[0].name])
    rows = []
    for one in tqdm(candidates, desc="differences", unit="model", leave=False):
        largest, agreement = differences(calls[one.name], references[one.merging], compared, output)
        own_speed = speed(trials[one.name])
        rows.append({"name": one.name, "size": one.size, "images_per_second": own_speed, "ratio": own_speed / first})
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


if __name__ == "__main__":
    main()
