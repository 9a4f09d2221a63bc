"""mIoU and images/s of runs over their threshold, with the automatic one marked (ALGM, figures 4, 7 and 8).

python scripts/threshold_curves.py ade20k "applied=runs/seg_tiny --patch-type algm" runs/seg_tiny_algm --out runs/curves
"""

import json
import re
from pathlib import Path
from typing import Any

import click
import torch
from tqdm import tqdm
from tradeoff import Row, Setting, Tradeoff

from patch.budget import knob_of
from segm.auto_threshold import automatic_thresholds
from segm.checkpoint import weights_digest
from segm.cli import FOLDER, POSITIVE, Command, dataset_argument, device_option, markdown, max_images_option
from segm.eval.timing import environment
from segm.merging import PURE
from segm.report import open_runs
from segm.run import Run
from segm.storage import write_picture, write_text
from segm.tune import falling
from vis import threshold_curves

COLUMNS = {
    "run": "{name}",
    "threshold": "{shown}",
    "tokens": "{tokens:.0f}",
    "mIoU": "{mean_iou:.2f}",
    "images/s": "{images_per_second:.2f}",
}


@click.command(cls=Command)
@dataset_argument
@click.argument("texts", metavar="RUN [RUN ...]", nargs=-1, required=True)
@click.option("--thresholds", type=float, nargs=3, default=(0.98, 0.7, 0.04), metavar="HIGHEST LOWEST STEP")
@click.option("--cost-images", type=POSITIVE, default=8, help="Images for the speed.")
@click.option("--auto-images", type=POSITIVE, default=100, help="Training images for the automatic threshold.")
@click.option("--out", type=FOLDER, required=True, help="Folder of thresholds.json, thresholds.png and measurements.")
@device_option
@max_images_option
def main(
    dataset_name: str,
    texts: tuple[str, ...],
    thresholds: tuple[float, float, float],
    cost_images: int,
    auto_images: int,
    out: Path,
    device: torch.device,
    max_images: int | None,
) -> None:
    """Score and time each RUN on DATASET over its threshold, and draw all in one picture.

    A RUN is a checkpoint, a run directory or "NAME=PATH [merging options]", as in segm/report.py; its method has a
    threshold. The automatic one is the mean + std of the similarities in the first layer that merges, of the run
    without merging. Known measurements are not repeated.
    """
    values, runs = falling(thresholds), open_runs(texts, dataset_name, device)
    for run in runs:
        check_run(run)
    rows, automatic = list[Row](), dict[str, float]()
    for run in tqdm(runs, "runs", unit="run", leave=False):
        auto = automatic_threshold(run, dataset_name, auto_images)
        conditions = {"weights": weights_digest(run.model.state_dict()), **environment(device)}
        file = out / "measured" / (re.sub(r"[^\w.-]+", "-", run.name) + ".json")
        tradeoff = Tradeoff(run.unpatched(), dataset_name, file, conditions, cost_images, max_images)
        settings = {one: Setting(run.method, run.options | {"threshold": one}) for one in sorted({*values, auto})}
        found = tradeoff.measure([Setting(), *settings.values()])
        for threshold, row in zip([None, *settings], found, strict=True):
            rows.append({"name": run.name, "threshold": threshold, "automatic": threshold == auto, **row})
        automatic[run.name] = auto
    click.echo(markdown(COLUMNS, map(shown, rows)))
    write_text(out / "thresholds.json", json.dumps(rows, indent=2, default=list) + "\n")
    write_picture(out / "thresholds.png", threshold_curves(rows, automatic))
    click.echo(f"written to {out}")


def check_run(run: Run) -> None:
    """Raise a ValueError for a run whose tokens no threshold decides on."""
    if run.method == PURE or knob_of(run.method) != "threshold" or run.options.get("tokens") is not None:
        budget = f" --tokens {run.options['tokens']}" if run.options.get("tokens") is not None else ""
        raise ValueError(
            f'{run.name} merges with {run.method}{budget}, without a threshold: give "NAME=PATH --patch-type METHOD" '
            "with a method that has one, and no budget"
        )


def automatic_threshold(run: Run, dataset_name: str, n_images: int) -> float:
    """Mean + std of the similarities in the first layer that merges, to four digits."""
    layer = run.options["layers"][0]
    found = automatic_thresholds(run.path, dataset_name, [layer], run.device, n_images, run.crop_size)
    return round(found[layer].threshold, 4)


def shown(row: Row) -> dict[str, Any]:
    """A row as the table shows it."""
    threshold = "none" if row["threshold"] is None else f"{row['threshold']:g}"
    return {**row, "shown": threshold + " (automatic)" * row["automatic"]}


if __name__ == "__main__":
    main()
