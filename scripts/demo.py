"""The demo behind `make demo`: train, merge, measure and look, on the built-in `shapes` data set.

Trains a small Segmenter, goes on from it without merging and, for as long, with graph merging, applies ALGM and ToMe to
the one without as it is, draws two sheets of pictures, and ends with the report of all: measured on held-out scenes, as
a table and as a web page. Everything lies in runs/demo. A finished training is not repeated.
"""

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
import torch
from trainings import train_unless_finished

import patch
from segm import report
from segm.cli import Command, default_device
from segm.data import Sample, create_dataset
from segm.merging import assignment_of
from segm.run import Run
from segm.storage import write_picture
from vis import colorize, fill_tokens, legend, outline_tokens, picture_sheet

ROOT = Path(__file__).resolve().parents[1]
NETWORK = ["--patch-size", "8", "--d-model", "64", "--n-heads", "2", "--n-layers", "4", "--no-pretrained"]
SCHEDULE = [
    *["--optimizer", "adamw", "--scheduler", "cosine", "--weight-decay", "0.01"],
    *["--drop-path", "0", "--decoder-dropout", "0"],  # too short a training to overfit
]
COMMON = ["--dataset", "shapes", "--backbone", "vit_tiny_patch16_384", "--batch-size", "8", "--num-workers", "1"]
THRESHOLD = 0.95
START = "start"  # the run that the others go on from
EPOCHS, MORE = 2, 2  # of the start, and of those that go on from it
GO_ON = ["--finetune", "{start}", "--learning-rate", "3e-4", "--epochs", str(MORE)]
TRAININGS = {
    START: [*NETWORK, "--learning-rate", "2e-3", "--epochs", str(EPOCHS), "--eval-freq", str(EPOCHS)],
    "pure": GO_ON,
    "graph": [*GO_ON, "--patch-type", "graph", "--selected-layer", "2", "--threshold", str(THRESHOLD)],
}
APPLIED = {
    "algm": ["--patch-type", "algm", "--selected-layers", "1", "3", "--threshold", str(THRESHOLD)],
    "tome": ["--patch-type", "tome", "--r", "32"],
}
FRONT = {"layers": [1, 2], "tokens": 0.6}  # of keymatch on the first picture; the model has four layers
N_PICTURES, N_COST_IMAGES = 4, 10
N_THREADS = 1  # on the CPU threads of so small a model mostly wait for each other, above all on a busy machine


SUMMARY = """
All rows were trained for {epochs} epochs. With images of {tokens} tokens, merging costs about the time that it saves:
it pays for larger images and models (RESULTS.md).

open {out}/report.html
next, faster settings of this model on your machine: python segm/tune.py {out}/pure shapes --minutes 5"""


@click.command(cls=Command)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "runs/demo", help="Where results go."
)
def main(out: Path) -> None:
    """Train, evaluate and picture a small Segmenter, plain and with graph merging."""
    device = torch.device(default_device())
    torch.set_num_threads(N_THREADS)
    for name, options in TRAININGS.items():
        own = [option.format(start=out / START) for option in options]
        train_unless_finished(out / name, [*COMMON, *SCHEDULE, *own], threads=N_THREADS)
    runs = [f"{name}={shlex.quote(str(out / name))}" for name in TRAININGS if name != START]
    runs += [f"{name}={shlex.quote(str(out / 'pure'))} {shlex.join(options)}" for name, options in APPLIED.items()]
    opened = report.open_runs(runs, None, device)
    dataset = create_dataset("shapes", "val")
    samples = [dataset[index] for index in range(N_PICTURES)]
    write_picture(out / "front.png", front_sheet(opened[0], samples))
    write_picture(out / "tokens.png", token_sheet(opened, samples))
    write_picture(out / "predictions.png", prediction_sheet(opened, samples))
    click.echo(f"\npictures: {out}/front.png, {out}/tokens.png, {out}/predictions.png\n")
    page = ["--cost-images", str(N_COST_IMAGES), "--pictures", str(N_PICTURES), "--out", str(out / "report.html")]
    report.main([*runs, *page], standalone_mode=False)
    tokens = math.prod(opened[0].model.grid(opened[0].crop_size))
    shown = out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out
    click.echo(SUMMARY.format(epochs=EPOCHS + MORE, tokens=tokens, out=shlex.quote(str(shown))))


@torch.inference_mode()
def front_sheet(plain: Run, samples: Sequence[Sample]) -> np.ndarray:
    """A scene, its merged tokens, and the labels from all tokens and from the merged ones; the scene is the one whose
    labels from all tokens are as right as those of half of the others: a typical one."""
    accuracies = [np.mean(plain.predict(sample.image) == sample.label) for sample in samples]
    sample = samples[np.argsort(accuracies)[len(samples) // 2]]
    merged = plain.with_settings("keymatch", FRONT)
    view = plain.preprocess(sample.image)
    before, after = (colorize(run.model.predict(view)[0].cpu().numpy(), run.palette) for run in (plain, merged))
    assignment, grid = assignment_of(patch.reduction(merged.model)), merged.model.grid(view.shape[-2:])
    outlined = outline_tokens(sample.image, assignment, grid, merged.model.patch_size)
    left = assignment.max() + 1
    titles = ["image", f"{left} of {len(assignment)} tokens", f"labels from {len(assignment)}", f"labels from {left}"]
    return picture_sheet([[sample.image, outlined, before, after]], titles, inches=2.4)


@torch.inference_mode()
def token_sheet(runs: Sequence[Run], samples: Sequence[Sample]) -> np.ndarray:
    """Input, and for every merging method its tokens, filled with their mean color, with their number."""
    merging = [run for run in runs if patch.is_patched(run.model)]
    rows, captions = [], []
    for sample in samples:
        row, caption = [sample.image], [""]
        for run in merging:
            view = run.preprocess(sample.image)
            run.model.grid_logits(view)
            reduction, grid = patch.reduction(run.model), run.model.grid(view.shape[-2:])
            assignment = reduction.assignment[0].cpu().numpy()
            row.append(fill_tokens(sample.image, assignment, grid, run.model.patch_size))
            caption.append(f"{reduction.counts.item()} of {grid[0] * grid[1]} tokens")
        rows.append(row)
        captions.append(caption)
    return picture_sheet(rows, ["input", *(run.name for run in merging)], captions)


def prediction_sheet(runs: Sequence[Run], samples: Sequence[Sample]) -> np.ndarray:
    """Input, truth, and what every model predicts."""
    classes, palette = runs[0].classes, runs[0].palette
    rows = []
    for sample in samples:
        maps = [sample.label, *(run.predict(sample.image) for run in runs)]
        rows.append([sample.image, *(colorize(labels, palette) for labels in maps)])
    sheet = picture_sheet(rows, ["input", "truth", *(run.name for run in runs)])
    names = legend(classes, palette)
    below = sheet.shape[0] - names.shape[0]
    return np.hstack([sheet, np.pad(names, ((0, below), (0, 0), (0, 0)), constant_values=255)])


if __name__ == "__main__":
    main()
