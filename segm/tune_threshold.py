"""Find the lowest threshold that costs no mIoU (ALGM* in the paper)."""

import copy
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from tqdm import tqdm

import patch
from segm.checkpoint import checkpoint_file
from segm.cli import checkpoint_argument, dataset_argument, device_option, max_images_option
from segm.eval.comparison import mean_tokens
from segm.eval.environment import device_name
from segm.eval.timing import interleaved_rates
from segm.files import write_text
from segm.merging import PURE, MergingCommand, apply
from segm.pictures import write_picture
from segm.run import Run
from vis import threshold_curves

COST_IMAGES = 10


@click.command(cls=MergingCommand)
@checkpoint_argument
@dataset_argument
@click.option("--highest", type=float, default=1.0, show_default=True, help="First threshold.")
@click.option("--lowest", type=float, default=0.7, show_default=True, help="Last threshold.")
@click.option(
    "--step", type=click.FloatRange(min=0, min_open=True), default=0.02, show_default=True, help="Between two."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of results.json and curves.png; what it holds is not measured again.  [default: beside CHECKPOINT]",
)
@device_option
@max_images_option
def main(
    checkpoint: Path,
    dataset_name: str,
    highest: float,
    lowest: float,
    step: float,
    out: Path | None,
    device: torch.device,
    max_images: int | None,
    merging: dict[str, Any],
) -> None:
    """Score CHECKPOINT on DATASET at falling thresholds, and name the lowest that keeps the mIoU of the plain model.

    Prints a table of mIoU (percent) and, on the first images at crop x crop pixels, tokens per image and images/s;
    interleaved. The threshold found is the last one down to which no threshold scored
    below the unpatched model.
    """
    thresholds = falling(highest, lowest, step)
    if merging.get("threshold") is not None:
        raise click.UsageError("--threshold: the thresholds to try go from --highest to --lowest")
    plain = Run.load(checkpoint, device=device, patch_type=PURE)
    method, options = plain.choose(merging)
    if method == PURE or not patch.find(method).takes("threshold"):
        names = ", ".join(name for name, entry in patch.METHODS.items() if entry.takes("threshold"))
        raise click.UsageError(f"name a method with a threshold: --patch-type {{{names}}}")
    patched = apply(copy.deepcopy(plain.model), method, options | {"threshold": highest})
    dataset, _ = plain.open(name=dataset_name)
    tuning = Tuning(plain, replace(plain, model=patched), [*plain.views(dataset_name, COST_IMAGES)])

    def score(threshold: float | None) -> dict[str, Any]:
        return tuning.at(threshold).evaluate(dataset=dataset, n_images=max_images)

    file = checkpoint_file(checkpoint)
    folder = out or file.parent / f"tune_threshold_{method}"
    settings = {"method": method, "dataset": dataset_name, "max_images": max_images, **_readable(options)}
    settings |= {"checkpoint": file.name, "changed": file.stat().st_mtime, "device": device_name(device)}
    rows = measure_all(folder / "results.json", settings, [None, *thresholds], score, tuning)
    _report(rows, folder)


def falling(highest: float, lowest: float, step: float) -> list[float]:
    """Thresholds from `highest` down to `lowest`, which is always the last one.

    Raises:
        ValueError: not -1 <= lowest <= highest <= 1.
    """
    if not -1 <= lowest <= highest <= 1:
        raise ValueError(f"--lowest {lowest}, --highest {highest}: give -1 <= lowest <= highest <= 1")
    count = math.floor((highest - lowest) / step + 1e-6) + 1
    thresholds = [round(highest - step * index, 6) for index in range(count)]
    return thresholds if thresholds[-1] <= lowest + 1e-6 else [*thresholds, lowest]


@dataclass(frozen=True)
class Tuning:
    """A run without and with merging, and what their cost is measured with.

    Attributes:
        plain, merging: the same weights, unpatched and patched.
        views: images (1, 3, H, W), on the device of the run.
    """

    plain: Run
    merging: Run
    views: Sequence[Tensor]

    def at(self, threshold: float | None) -> Run:
        """The run that merges at a threshold; None: the unpatched one."""
        if threshold is None:
            return self.plain
        patch.set_threshold(self.merging.model, threshold)
        return self.merging

    def tokens(self, threshold: float | None) -> float:
        """Mean number of patch tokens that the images keep."""
        return mean_tokens(self.at(threshold).model, self.views)

    def rates(self, thresholds: Sequence[float | None]) -> dict[float | None, float]:
        """threshold -> median images/s of `predict`, all interleaved."""
        calls = {threshold: lambda view, t=threshold: self.at(t).model.predict(view) for threshold in thresholds}
        rates = interleaved_rates(calls, self.views, self.plain.device, progress=True)
        return {threshold: values.quantile(0.5).item() for threshold, values in rates.items()}


def measure_all(
    file: Path,
    settings: dict[str, Any],
    thresholds: Sequence[float | None],
    score: Callable[[float | None], Mapping[str, Any]],
    tuning: Tuning,
) -> list[dict[str, Any]]:
    """Measure every threshold that a file does not hold yet, and the speed of all of them.

    Args:
        file: JSON with the settings and rows of earlier measurements, if it is there; it is kept up to date.
        settings: what the rows depend on.
        thresholds: None stands for the unpatched model.
        score: threshold -> `segmentation_scores`.
        tuning: `Tuning`.

    Returns:
        One dict per threshold: `threshold`, `mean_iou` (percent), `tokens`, `images_per_second`.

    Raises:
        ValueError: the file holds measurements with other settings, or something else.
    """
    known = _read_rows(file, settings)
    for threshold in tqdm([t for t in thresholds if t not in known], desc="thresholds", leave=False):
        row = {"threshold": threshold, "mean_iou": score(threshold)["mean_iou"], "tokens": tuning.tokens(threshold)}
        known[threshold] = row
        _write_rows(file, settings, known)
    if not all("images_per_second" in known[threshold] for threshold in thresholds):
        for threshold, rate in tuning.rates(thresholds).items():  # all together, or they would not compare
            known[threshold]["images_per_second"] = rate
        _write_rows(file, settings, known)
    return [known[threshold] for threshold in thresholds]


def _read_rows(file: Path, settings: dict[str, Any]) -> dict[float | None, dict[str, Any]]:
    """threshold -> row of an earlier measurement with the same settings."""
    if not file.exists():
        return {}
    try:
        saved = json.loads(file.read_text())
        rows = {row["threshold"]: row for row in saved["rows"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no measurements: remove it, or choose another --out") from error
    if saved.get("settings") != settings:
        raise ValueError(f"{file} was measured with another checkpoint or other settings: choose another --out")
    return rows


def _write_rows(file: Path, settings: dict[str, Any], rows: dict[float | None, dict[str, Any]]) -> None:
    write_text(file, json.dumps({"settings": settings, "rows": [*rows.values()]}, indent=2))


def _readable(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as JSON gives them back, the threshold left out."""
    kept = {name: value for name, value in options.items() if name != "threshold"}
    return json.loads(json.dumps(kept))


def _report(rows: list[dict[str, Any]], folder: Path) -> None:
    click.echo(f"{'threshold':>9} {'mIoU':>6} {'tokens':>8} {'images/s':>9}")
    for row in rows:
        name = "pure" if row["threshold"] is None else f"{row['threshold']:.3f}"
        click.echo(f"{name:>9} {row['mean_iou']:6.2f} {row['tokens']:8.1f} {row['images_per_second']:9.1f}")
    best = lowest_without_loss(rows)
    write_picture(folder / "curves.png", threshold_curves(rows[0], rows[1:], best))
    if best is None:
        click.echo("no threshold keeps the mIoU of the unpatched model")
    else:
        click.echo(f"lowest threshold without loss: {best}")
    click.echo(f"written to {folder}")


def lowest_without_loss(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """Lowest threshold down to which no threshold scored below the unpatched model; None if the first does.

    Args:
        rows: the unpatched model first, then falling thresholds.
    """
    pure, best = rows[0]["mean_iou"], None
    for row in rows[1:]:
        if row["mean_iou"] < pure:
            break
        best = row["threshold"]
    return best


if __name__ == "__main__":
    main()
