"""Time and memory of one merge over the number of patches.

python scripts/benchmark_scale.py
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from method_cost import peak_memory
from results_file import PICTURES, append, out_option
from torch import Tensor
from tqdm import tqdm

import g2tm
from segm.cli import Command, Listed, device_option, markdown
from segm.eval.timing import environment, interleaved_rates
from segm.storage import write_picture
from vis import scale_curves

THRESHOLD = 0.5
MERGES = {
    "graph": lambda x, grid: g2tm.graph_merge(x, grid, THRESHOLD),
    "CLAP": lambda x, grid: g2tm.clap(x, grid, THRESHOLD),
    "ToMe": lambda x, grid: g2tm.bipartite(x, r=x.shape[1] // 12),
}
COLUMNS = {
    "method": "{method}",
    "patches": "{patches}",
    "tokens left": "{tokens}",
    "µs per patch": "{microseconds_per_patch:.2f}",
    "peak KiB per patch": "{memory}",
}


@click.command(cls=Command)
@click.option(
    "--grids", type=Listed(int), default="16,32,48,64,96,128", show_default=True, help="Patches per side, even."
)
@click.option("--width", type=click.IntRange(min=1), default=384, show_default=True, help="Of the tokens.")
@click.option("--repeats", type=click.IntRange(min=1), default=15, show_default=True, help="Timed calls.")
@out_option
@device_option
def main(grids: tuple[int, ...], width: int, repeats: int, out: Path, device: torch.device) -> None:
    """Merge and unmerge the tokens of one image, for grids of several sizes, and print microseconds and peak KiB per
    patch. Tokens are random, half of the 2 x 2 windows are alike: graph and CLAP leave five eighths."""
    rows = []
    for side in tqdm(grids, desc="grids", leave=False):
        x = half_alike(side, width).to(device)
        calls = {name: partial(merge_and_back, merge, side) for name, merge in MERGES.items()}
        rates = interleaved_rates(calls, [x], device, repeats=repeats)
        for name, call in calls.items():
            memory = peak_memory(call, x, device)
            rows.append(
                {
                    "method": name,
                    "patches": side**2,
                    "tokens": MERGES[name](x, (side, side)).counts.item(),
                    "microseconds_per_patch": 1e6 / rates[name].item() / side**2,
                    "kib_per_patch": None if memory is None else 1024 * memory / side**2,
                }
            )
    click.echo(f"{environment(device)['device']}, width {width}, float32")
    click.echo(format_rows(rows))
    append("training", "scale", rows, device, out, width=width)
    write_picture(out / PICTURES / "scale.png", scale_curves(rows))


def half_alike(side: int, width: int) -> Tensor:
    """(1, side², width): random tokens, in every other of the 2×2 windows nearly the same four times."""
    torch.manual_seed(0)
    windows = torch.randn(width, side // 2, side // 2).repeat_interleave(2, 1).repeat_interleave(2, 2)
    alike = (torch.rand(side // 2, side // 2) < 0.5).repeat_interleave(2, 0).repeat_interleave(2, 1)
    tokens = torch.where(alike, windows, torch.randn(width, side, side)) + 0.3 * torch.randn(width, side, side)
    return tokens.flatten(1).T.unsqueeze(0).contiguous()


@torch.inference_mode()
def merge_and_back(merge: Callable[..., g2tm.Reduction], side: int, x: Tensor) -> Tensor:
    """One merge and its undoing; x: (1, side², D)."""
    reduction = merge(x, (side, side))
    return reduction.unmerge(reduction.merge(x))


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    return markdown(COLUMNS, [row | {"memory": _kib(row["kib_per_patch"])} for row in rows])


def _kib(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"


if __name__ == "__main__":
    main()
