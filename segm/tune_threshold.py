"""The released name of `segm/tune.py`, for the thresholds of one method."""

import math
from pathlib import Path
from typing import Any

import click

from segm import cli, tune
from segm.merging import MergingCommand

GIVEN: dict[str, Any] = {"within": 0.3, "minutes": math.inf, "precisions": [], "calibrate": "val"}


@click.command(cls=MergingCommand)
@cli.checkpoint_argument
@cli.dataset_argument
@click.option("--highest", type=float, default=1.0, help="First threshold, a cosine similarity.")
@click.option("--lowest", type=float, default=0.7, help="Last threshold, a cosine similarity.")
@click.option("--step", type=cli.ABOVE_ZERO, default=0.02, help="Distance of two thresholds.")
@click.option("--im-size", "sizes", cls=cli.Numbers, type=cli.POSITIVE, help="See `g2tm tune`.  [default: the run's]")
@tune.baseline_option
@click.option("--images-per-second", type=cli.ABOVE_ZERO, help="See `g2tm tune`.  [default: none]")
@click.option("--out", type=cli.FOLDER, hidden=True)
@cli.device_option
@cli.max_images_option
def main(highest: float, lowest: float, step: float, out: Path | None, merging: dict[str, Any], **how: Any) -> None:
    """Score CHECKPOINT on DATASET at falling thresholds, as `g2tm tune` does with --thresholds."""
    unused = f" (without --out {out}: results are in the run)" * (out is not None)
    click.echo(f"tune_threshold.py is now g2tm tune --thresholds {highest} {lowest} {step}{unused}", err=True)
    assert tune.main.callback is not None
    tune.main.callback(methods=[merging], thresholds=(highest, lowest, step), **GIVEN, **how)


if __name__ == "__main__":
    main()
