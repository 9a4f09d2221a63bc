"""How many tokens are left, and how large the merged ones are."""

import json
from collections import defaultdict
from pathlib import Path

import click
import numpy as np
import torch
from tqdm import tqdm

import patch
from segm.checkpoint import checkpoint_file
from segm.eval.runs import SquareViews, open_evaluation
from segm.options import (
    Command,
    checkpoint_argument,
    dataset_argument,
    device_option,
    load_patched,
    max_images_option,
    patch_options,
)
from segm.pictures import write_picture
from vis import token_histograms

QUANTILES = {"q05": 0.05, "median": 0.5, "q95": 0.95}


@click.command(cls=Command)
@checkpoint_argument
@dataset_argument
@click.option("--layer-id", type=click.IntRange(min=0), help="Only this encoder layer, counted from 0.  [default: all]")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of tokens.json and tokens.png.  [default: token_stats_<method> beside CHECKPOINT]",
)
@device_option
@max_images_option
@patch_options
def main(checkpoint, dataset_name, layer_id, out, device, max_images, **given):
    """Print how many patch tokens CHECKPOINT keeps on DATASET after every layer that merges, and how large they are.

    Over the validation images at crop x crop pixels: mean, median, 5 % and 95 % quantile of the number of tokens per
    image, and of the size (patches) of the tokens that stand for more or less than one patch.
    """
    model, variant = load_patched(checkpoint, given, device)
    if not patch.is_patched(model):
        raise click.UsageError("nothing merges in this model: name a method with --patch-type")
    check_layer(model, layer_id)
    dataset, _ = open_evaluation(variant, dataset_name)
    views = SquareViews(dataset, variant, max_images, device=device)
    statistics = collect(model, tqdm(views, desc="tokens", unit="image", leave=False))
    layers = {layer: found for layer, found in statistics.items() if layer_id in (None, layer - 1)}
    method = patch.method(model)
    folder = out or checkpoint_file(checkpoint).parent / f"token_stats_{method}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [summary(layer, **found) for layer, found in layers.items()]
    click.echo(format_rows(rows))
    content = {"method": method, "settings": patch.settings(model), "n_images": len(views), "layers": rows}
    (folder / "tokens.json").write_text(json.dumps(content, indent=2))
    write_picture(folder / "tokens.png", token_histograms(layers))
    click.echo(f"written to {folder}")


def check_layer(model, layer_id):
    """Raise a ValueError unless the model merges in that layer (0-based); None is all layers."""
    ids = [layer - 1 for layer in patch.settings(model)["layers"]]
    if layer_id is not None and layer_id not in ids:
        raise ValueError(f"--layer-id {layer_id}: tokens merge in {', '.join(map(str, ids))} (counted from 0)")


@torch.inference_mode()
def count_tokens(model, images):
    """Patch tokens that are left at the end of the encoder.

    Args:
        model: a Segmenter, patched or not.
        images: (B, 3, H, W).

    Returns:
        (B,), int64, on the CPU.
    """
    scores = model.grid_scores(images)
    if patch.is_patched(model) and patch.reduction(model) is not None:
        return patch.reduction(model).counts.cpu()
    return torch.full((len(images),), scores.shape[-2] * scores.shape[-1])


@torch.inference_mode()
def collect(model, views):
    """Token counts and sizes of a patched model.

    Args:
        views: iterable of batches (B, 3, H, W).

    Returns:
        1-based layer -> dict of `n_patches`, `counts` (images,), int64, and `sizes` (tokens that stand for more or
        less than one patch, of all images together), float32.
    """
    counts, sizes, n_patches = defaultdict(list), defaultdict(list), {}
    with patch.reductions(model) as steps:
        for images in views:
            model.grid_scores(images)
            for layer, step in steps.items():
                n_patches[layer] = int(step.sizes[0].sum().round())
                counts[layer].append(step.counts.cpu().numpy())
                kept = step.sizes[step.sizes > 0] if step.padded else step.sizes.flatten()
                sizes[layer].append(kept[kept != 1].cpu().numpy())
    return {
        layer: {
            "n_patches": n_patches[layer],
            "counts": np.concatenate(counts[layer]),
            "sizes": np.concatenate(sizes[layer]),
        }
        for layer in sorted(counts)
    }


def summary(layer, n_patches, counts, sizes):
    """One layer's numbers for a table: mean and quantiles of counts and sizes; sizes None where nothing merged."""
    return {"layer": layer, "n_patches": n_patches, "tokens": _spread(counts), "sizes": _spread(sizes)}


def _spread(values):
    if not len(values):
        return None
    return {"mean": float(np.mean(values))} | {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}


def format_rows(rows):
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
