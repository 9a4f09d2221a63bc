"""Profile a trained Segmenter, operator by operator."""

from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import patch
from segm.cli import FILE, POSITIVE, batch_size_option, checkpoint_argument, device_option, images_argument
from segm.eval.timing import device_name
from segm.merging import MergingCommand
from segm.model.segmenter import Segmenter
from segm.run import Run

FORWARD, MERGE = "forward pass", "merging and its undoing"


@click.command(cls=MergingCommand)
@checkpoint_argument
@images_argument
@batch_size_option
@click.option("--max-images", type=POSITIVE, default=10, help="Number of images, spread over the data set.")
@click.option("--rows", type=POSITIVE, default=20, help="Number of operators to list.")
@click.option(
    "--out",
    type=FILE,
    help="Chrome trace to write, for ui.perfetto.dev.  [default: trace_<method>.json next to CHECKPOINT]",
)
@device_option
def main(
    checkpoint: Path, images: str | Path, batch_size: int, max_images: int, rows: int, out: Path | None, **how: Any
) -> None:
    """Print the operators of CHECKPOINT by time and the share of merging, and write a Chrome trace.

    One forward pass of the model over images of DATASET at the crop size, after one that is not profiled.
    """
    run = Run.load(checkpoint, amp=False, **how)
    trace = out or run.folder / f"trace_{run.method}.json"
    trace.parent.mkdir(parents=True, exist_ok=True)
    views = [*run.views(images, max_images, batch_size=batch_size)]
    profiler = run_profile(run.model, views, run.device)
    operators, side = profiler.key_averages(), "device" if run.device.type == "cuda" else "cpu"
    click.echo(operators.table(sort_by=f"self_{side}_time_total", row_limit=rows, max_name_column_width=45))
    times = {event.key: getattr(event, f"{side}_time_total") for event in operators}  # microseconds
    total, merges = times[FORWARD], times.get(MERGE, 0)
    click.echo(f"{device_name(run.device)}: {total / len(views) / 1000:.2f} ms per pass of {len(views[0])} images")
    click.echo(f"{MERGE}: {merges / len(views) / 1000:.2f} ms, {100 * merges / total:.1f} % of it")
    profiler.export_chrome_trace(str(trace))
    click.echo(f"written to {trace}")


@torch.inference_mode()
def run_profile(model: Segmenter, views: list[Tensor], device: torch.device) -> profile:
    """Profile one forward pass per batch, with ranges named `FORWARD` and `MERGE`.

    Args:
        model: a Segmenter, patched or not.
        views: list of batches (B, 3, H, W).
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    model(views[0])  # the first pass allocates and chooses kernels
    with patch.merge_ranges(model, MERGE), profile(activities=activities) as profiler:
        for images in views:
            with record_function(FORWARD):
                model(images)
    return profiler


if __name__ == "__main__":
    main()
