"""A trained Segmenter as an ONNX file, checked in ONNX Runtime."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

from segm.checkpoint import checkpoint_file
from segm.cli import Images, checkpoint_argument, im_size_option, markdown, max_images_option
from segm.eval.timing import interleaved_trials, speed
from segm.eval.views import Views
from segm.exported import OnnxModel
from segm.exporting import OPSET, OUTPUTS, export, quantize
from segm.merging import MergingCommand
from segm.run import Run

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
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="File to write.  [default: model.onnx in the run]"
)
@click.option(
    "--output",
    type=click.Choice(OUTPUTS),
    default="scores",
    show_default=True,
    help="Output of the graph: class logits per patch, logits per pixel, or the label map.",
)
@click.option("--batch-size", type=click.IntRange(min=1), help="Number of images per pass.  [default: any]")
@click.option(
    "--opset",
    type=click.IntRange(18, OPSET),
    default=OPSET,
    show_default=True,
    help="Version of ONNX's operators; some compilers need an older one.",
)
@click.option("--int8", is_flag=True, help="Also write the model in int8, quantized dynamically, and statically.")
@click.option(
    "--images",
    type=Images(),
    metavar="DATASET|FOLDER",
    help="Images for the check and for the ranges of static quantization.  [default: the run's data set]",
)
@im_size_option
@max_images_option
def main(
    checkpoint: Path,
    out: Path | None,
    output: str,
    batch_size: int | None,
    opset: int,
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
    for kind in ("dynamic", "static") if int8 else ():
        files[f"ONNX Runtime, int8, {kind}"] = out.with_name(f"{out.stem}_int8_{kind}.onnx")
        calibration = _calibration(run, images) if kind == "static" else None
        quantize(out, files[f"ONNX Runtime, int8, {kind}"], calibration)
    models = {name: OnnxModel(file) for name, file in files.items()}
    views = Views(samples, run.windows.size, run.normalization, max_images, batch_size=batch_size or 1)
    rows = compare(run, models, views, output)
    for row in rows:
        row["size"] = files[row["name"]].stat().st_size / 2**20 if row["name"] in files else _mib(run)
    columns = dict(COLUMNS)
    if not isinstance(images, Path) and output != "labels":
        columns["mIoU"] = "{mean_iou:.2f}"
        _score(run, models, rows, images, max_images)
    click.echo(f"{out}: ONNX, opset {opset}, images {batch_size or 'B'} × 3 × {' × '.join(map(str, run.windows.size))}")
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


def _score(
    run: Run,
    models: Mapping[str, OnnxModel],
    rows: list[dict[str, Any]],
    images: str | None,
    max_images: int | None,
) -> None:
    """Add mIoU on a data set to the rows."""
    runs = {f"{PYTORCH}, pure": run.unpatched(), f"{PYTORCH}, {run.method}": run}
    runs |= {name: replace(run, model=model) for name, model in models.items()}
    for row in tqdm(rows, desc="scores", unit="model", leave=False):
        row["mean_iou"] = runs[row["name"]].evaluate(dataset=images, n_images=max_images)["mean_iou"]


def _calibration(run: Run, images: str | Path | None) -> list[Tensor]:
    """Images that the ranges of activations are taken from: of the training split, or photographs."""
    samples = run.views(images, split="train").samples
    return list(Views(samples, run.windows.size, run.normalization, N_CALIBRATION))


def _mib(run: Run) -> float:
    """Size of the weights in float32."""
    return sum(tensor.numel() for tensor in run.model.parameters()) * 4 / 2**20


if __name__ == "__main__":
    main()
