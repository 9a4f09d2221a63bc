"""Numbers of tokens that are left, and sizes of the merged ones."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import patch
from segm import cli
from segm.merging import MergingCommand
from segm.model.segmenter import Segmenter
from segm.run import Run
from segm.storage import write_picture, write_text
from vis import token_histograms

QUANTILES = {"q05": 0.05, "median": 0.5, "q95": 0.95}


@click.command(cls=MergingCommand)
@cli.checkpoint_argument
@cli.images_argument
@click.option("--layer-id", type=cli.COUNT, help="Encoder layer, counted from 0.  [default: all that merge]")
@click.option(
    "--out",
    type=cli.FOLDER,
    help="Folder for tokens.json and tokens.png.  [default: token_stats_<method> next to CHECKPOINT]",
)
@cli.im_size_option
@cli.device_option
@cli.max_images_option
def main(
    checkpoint: Path, images: str | Path, layer_id: int | None, out: Path | None, max_images: int | None, **how: Any
) -> None:
    """Print how many patch tokens CHECKPOINT keeps on DATASET, and how large they are, after every layer that merges.

    Over the validation images at the crop size: mean, median, 5 % and 95 % quantile of the number of tokens per
    image, and of the size (patches) of the tokens that stand for more or less than one patch.
    """
    run = Run.load(checkpoint, amp=False, **how)
    if not patch.is_patched(run.model):
        raise click.UsageError("nothing merges in this model: name a method with --patch-type")
    depth = len(run.model.encoder.blocks)
    if layer_id is not None and layer_id >= depth:
        raise ValueError(f"--layer-id {layer_id}: the encoder has layers 0 to {depth - 1}, counted from 0")
    views = run.views(images, max_images)
    layers = collect(run.model, tqdm(views, desc="tokens", unit="image", leave=False))
    if layer_id is not None:
        layers = {layer_id + 1: after(layers, layer_id + 1, run.options.get("restore_at"))}
    folder = out or run.folder / f"token_stats_{run.method}"
    rows = [
        {
            "layer": layer,
            "n_patches": one["n_patches"],
            "tokens": _spread(one["counts"]),
            "sizes": _spread(one["sizes"]),
        }
        for layer, one in layers.items()
    ]
    click.echo(format_rows(rows))
    content = {"method": run.method, "settings": run.options, "n_images": len(views), "layers": rows}
    write_text(folder / "tokens.json", json.dumps(content, indent=2))
    write_picture(folder / "tokens.png", token_histograms(layers))
    click.echo(f"written to {folder}")


@torch.inference_mode()
def collect(model: Segmenter, views: Iterable[Tensor]) -> dict[int, dict[str, Any]]:
    """Token counts and sizes of a patched model.

    Args:
        views: batches (B, 3, H, W).

    Returns:
        1-based layer -> dict of `n_patches`, `counts` (images,), int64, and `sizes` (tokens that stand for more or
        less than one patch, of all images together), float32.
    """
    counts, sizes, n_patches = defaultdict(list), defaultdict(list), 0
    for images in views:
        model.grid_logits(images)
        n_patches = math.prod(model.grid(images.shape[-2:]))
        for layer, step in patch.reductions(model).items():
            counts[layer].append(step.counts.cpu().numpy())
            kept = step.sizes.flatten() if step.padding is None else step.sizes[~step.padding]
            sizes[layer].append(kept[kept != 1].cpu().numpy())
    joined = ((layer, np.concatenate(counts[layer]), np.concatenate(sizes[layer])) for layer in sorted(counts))
    return {layer: {"n_patches": n_patches, "counts": count, "sizes": size} for layer, count, size in joined}


def after(statistics: Mapping[int, dict[str, Any]], layer: int, restore_at: int | str | None) -> dict[str, Any]:
    """The statistics after any layer: those of the last one up to it that merged, or of all patches.

    Args:
        statistics: see `collect`.
        layer: 1-based.
        restore_at: the layer after which patches have their tokens back, where it is a number.
    """
    merged = [one for one in statistics if one <= layer]
    if merged and not (isinstance(restore_at, int) and restore_at <= layer):
        return statistics[max(merged)]
    n_patches, counts = (next(iter(statistics.values()))[key] for key in ("n_patches", "counts"))
    return {"n_patches": n_patches, "counts": np.full_like(counts, n_patches), "sizes": np.empty(0, np.float32)}


def _spread(values: np.ndarray) -> dict[str, float] | None:
    """Mean and quantiles; None where nothing merged."""
    if not len(values):
        return None
    return {"mean": float(np.mean(values))} | {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as text, one line per layer and quantity."""
    names = ("mean", "median", "q05", "q95")
    lines = [f"{'layer':>5} {'':<24}" + "".join(f"{name:>9}" for name in ("mean", "median", "5 %", "95 %"))]
    for row in rows:
        for key, label in (("tokens", f"tokens of {row['n_patches']}"), ("sizes", "size of merged tokens")):
            values = row[key]
            cells = "".join(f"{values[name]:9.1f}" for name in names) if values else "  nothing merged"
            lines.append(f"{row['layer']:5d} {label:<24}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
