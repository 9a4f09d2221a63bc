"""Similarities of tokens of one class and of different classes, by layer and window (ALGM, figure 2)."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import patch
from segm import cli
from segm.data import Sample, spread
from segm.merging import PURE
from segm.run import Run
from segm.storage import write_picture, write_text
from vis import class_similarity_curves

WHOLE = 0  # stands for the whole image among the windows
WINDOWS = (2, 4, 8, 16, WHOLE)
Moments = dict[tuple[int, int], Tensor]  # (layer, window) -> number and sum of the similarities, by kind of pair


@click.command(cls=cli.Command)
@cli.checkpoint_argument
@cli.dataset_argument
@click.option("--selected-layers", cls=cli.Numbers, type=int, help="Layers to measure, counted from 1.  [default: all]")
@click.option(
    "--windows",
    cls=cli.Numbers,
    type=cli.COUNT,
    help="Sides of the windows in which tokens are compared, patches; 0: the whole image.  [default: 2 4 8 16 0, those "
    "that fit]",
)
@click.option(
    "--out",
    type=cli.FOLDER,
    help="Folder for similarity.json and similarity.png.  [default: similarity_<data set> next to CHECKPOINT]",
)
@cli.device_option
@cli.max_images_option
def main(
    checkpoint: Path,
    dataset_name: str,
    selected_layers: tuple[int, ...],
    windows: tuple[int, ...],
    out: Path | None,
    device: torch.device,
    max_images: int | None,
) -> None:
    """Print how similar tokens of one class, and tokens of different classes, are in CHECKPOINT.

    Mean cosine similarities of the pairs of patch tokens in a window, after the attention of a layer, over the
    validation images of DATASET at the crop size; merging is off. A token has the class of most labeled pixels of its
    patch, and is left out where none is labeled.
    """
    run = Run.load(checkpoint, device=device, amp=False, patch_type=PURE)
    layers = list(selected_layers) or list(range(1, len(run.model.encoder.blocks) + 1))
    sides = check_windows(windows, run.model.grid(run.crop_size))
    dataset, _ = run.open(name=dataset_name)
    indices = spread(max_images, len(dataset))
    bar = tqdm((dataset[index] for index in indices), "similarities", len(indices), unit="image", leave=False)
    moments = collect(run, bar, layers, sides)
    rows = [{"layer": layer, "window": side, **_means(one)} for (layer, side), one in moments.items()]
    click.echo(f"mean cosine similarity of tokens: of one class / of different classes, {len(indices)} images")
    click.echo(table(rows))
    folder = out or run.folder / f"similarity_{dataset.name}"
    content = {"dataset": dataset.name, "n_images": len(indices), "rows": rows}
    write_text(folder / "similarity.json", json.dumps(content, indent=2) + "\n")
    write_picture(folder / "similarity.png", class_similarity_curves(rows))
    click.echo(f"written to {folder}")


def check_windows(asked: Sequence[int], grid: tuple[int, int]) -> list[int]:
    """The sides of the windows, by default those of `WINDOWS` that fit; a ValueError for those that show nothing."""
    longest = max(grid)
    wrong = [side for side in asked if side != WHOLE and not 2 <= side < longest]
    if wrong:
        raise ValueError(
            f"--windows {wrong[0]}: images have {grid[0]} × {grid[1]} patches, give sides from 2 to {longest - 1}, "
            f"or {WHOLE} for the whole image"
        )
    chosen = asked or [side for side in WINDOWS if side < longest]
    return sorted({*chosen}, key=lambda side: side or longest)


@torch.inference_mode()
def collect(run: Run, samples: Iterable[Sample], layers: Sequence[int], windows: Sequence[int]) -> Moments:
    """Sums over images of `patch.class_similarity_moments`.

    Args:
        run: without merging.
        samples: images with labels.
        layers: 1-based, ascending.
        windows: sides, patches; `WHOLE`: the image.

    Returns:
        (layer, window) -> (2, 2), float64.

    Raises:
        ValueError: a layer that the model lacks, or images without labels.
    """
    grid, moments = run.model.grid(run.crop_size), Moments()
    with patch.tokens(run.model.encoder, layers) as tokens:
        for sample in samples:
            if sample.label is None:
                raise ValueError(f"{sample.name} has no labels: choose a data set whose validation images have some")
            labels = torch.from_numpy(patch_classes(sample.label, run)).to(run.device)[None]
            run.model.network(run.preprocess_resized(sample.image))
            for layer in layers:
                for side in windows:
                    window = (side, side) if side else None
                    found = patch.class_similarity_moments(tokens[layer], grid, labels, window).cpu()
                    moments[layer, side] = moments.get((layer, side), 0) + found
    return moments


def patch_classes(labels: np.ndarray, run: Run) -> np.ndarray:
    """The class of most labeled pixels of every patch of a resized image, (N,), of equal ones the first; -1: of none.

    labels: (H, W), at the original size.
    """
    gh, gw = run.model.grid(run.crop_size)
    rows, columns = patches_of_pixels(labels.shape, run)
    known = labels < run.n_cls
    place = (rows[:, None] * gw + columns)[known] * run.n_cls + labels[known]
    counts = np.bincount(place, minlength=gh * gw * run.n_cls).reshape(gh * gw, run.n_cls)
    return np.where(counts.any(1), counts.argmax(1), -1)


def patches_of_pixels(shape: Sequence[int], run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of the patch, where an image is resized to the crop size, of each row and column of its pixels.

    shape: (H, W, ...) of the image -> (H,) and (W,).
    """
    rows, columns = (
        ((np.arange(length) + 0.5) * side / length // patch_side).astype(int)
        for length, side, patch_side in zip(shape, run.crop_size, run.model.patch_size, strict=False)
    )
    return rows, columns


def table(rows: Sequence[dict]) -> str:
    """The means as a table, a row per layer and a column per window."""
    columns = {"layer": "{layer}"}
    lines: dict[int, dict[str, object]] = {}
    for row in rows:
        side, line = row["window"], lines.setdefault(row["layer"], {"layer": row["layer"]})
        columns[f"{side} × {side}" if side else "image"] = f"{{window{side}}}"
        line[f"window{side}"] = " / ".join(
            "-" if row[kind] is None else f"{row[kind]:.3f}" for kind in ("same", "different")
        )
    return cli.markdown(columns, lines.values())


def _means(moments: Tensor) -> dict[str, float | int | None]:
    """Means, None where there is no pair, and numbers of pairs, by kind."""
    found: dict[str, float | int | None] = {}
    for kind, (count, total) in zip(("same", "different"), moments.tolist(), strict=True):
        found |= {kind: total / count if count else None, f"pairs_{kind}": round(count)}
    return found


if __name__ == "__main__":
    main()
