"""Merging before the first block: windows whose pixels are flat are embedded as one patch, on a trained model.

The idea is that of APT (ICLR 2026), without its training. DATASET=… python scripts/flat_study.py runs/real/tuned camvid
"""

from pathlib import Path
from typing import Any

import click
import torch
import torch.nn.functional as F
from real_results import SMALL
from results_file import append, out_option
from torch import Tensor
from tqdm import tqdm

import g2tm
from patch.method import Choice, Number, Option, Step, register
from patch.operations import count_operations
from segm.cli import Command, Listed, checkpoint_argument, dataset_argument, device_option, markdown
from segm.merging import PURE
from segm.run import Run

SIGNALS = ("entropy", "error")
EMBEDDINGS = ("mean", "smaller copy")
SIDES = (4, 2)  # patches per side of a window, the largest first
BINS = 64  # of gray values
SHARES = (0.1, 0.25, 0.4)  # of the windows of every side that are flat


def window_signal(images: Tensor, side: int, pixels: int, signal: str) -> Tensor:
    """Content of every window: (B, 3, H, W) -> (B, h, w), for windows of side·pixels; less is flatter.

    entropy: of the histogram of its gray values, in bits. error: mean absolute difference to what remains of it when
    it is embedded as one patch, that is, of a copy `side` times smaller.
    """
    size = side * pixels
    whole = images[..., : images.shape[-2] // size * size, : images.shape[-1] // size * size]
    if signal == "error":
        smaller = F.avg_pool2d(whole, side)
        copy = F.interpolate(smaller, size=whole.shape[-2:], mode="bilinear", align_corners=False)
        return F.avg_pool2d((whole - copy).abs().mean(1, keepdim=True), size).squeeze(1)
    gray = whole.mean(1, keepdim=True)
    low, high = gray.amin((1, 2, 3), keepdim=True), gray.amax((1, 2, 3), keepdim=True)
    values = ((gray - low) / (high - low).clamp(min=1e-6) * BINS).long().clamp(max=BINS - 1)
    values = values.unflatten(3, (-1, size)).unflatten(2, (-1, size)).squeeze(1).transpose(2, 3).flatten(3)
    counts = torch.zeros(*values.shape[:3], BINS).scatter_add_(3, values, torch.ones_like(values, dtype=torch.float))
    shares = counts / values.shape[3]
    return -torch.xlogy(shares, shares).sum(-1) / torch.log(torch.tensor(2.0))


class Embedded(g2tm.Grouping):
    """Windows that become one patch; `change`, (B, N, D), turns the mean of their patches into their own embedding."""

    change: Tensor

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, M, D)"""
        return super().merge(x + self.change.to(x.dtype) if x.shape == self.change.shape else x)


def merge_flat(step: Step) -> g2tm.Reduction:
    """Merge the windows whose signal is below the limit of their side; the largest are taken first."""
    images, embed, options = step.encoder.study_images, step.encoder.patch_embed, step.options
    pixels, (gh, gw) = embed.patch_size[0], step.grid
    number = torch.arange(gh * gw).view(1, gh, gw).expand(len(images), -1, -1)
    root, change = number.clone(), torch.zeros_like(step.x).unflatten(1, (gh, gw))
    full = embed.proj(images).permute(0, 2, 3, 1)
    for side, limit in zip(SIDES, options["limits"], strict=True):
        flat = window_signal(images, side, pixels, options["signal"]) < limit
        rows, columns = flat.shape[1] * side, flat.shape[2] * side
        flat, first = (expanded(one, side) for one in (flat, number[:, :rows:side, :columns:side]))
        flat &= root[:, :rows, :columns] == number[:, :rows, :columns]  # not in a larger one
        root[:, :rows, :columns] = torch.where(flat, first, root[:, :rows, :columns])
        if options["embedding"] == EMBEDDINGS[1]:
            smaller = embed.proj(F.avg_pool2d(images[..., : rows * pixels, : columns * pixels], side))
            own = expanded(smaller.permute(0, 2, 3, 1), side) - full[:, :rows, :columns]
            change[:, :rows, :columns] = torch.where(flat.unsqueeze(-1), own, change[:, :rows, :columns])
    root = root.flatten(1)
    is_root = root == number.flatten(1)
    assignment = (is_root.cumsum(1) - 1).gather(1, root)
    merged = Embedded.of_counts(assignment, is_root.sum(1), step.sizes)
    merged.change = change.flatten(1, 2)
    return merged


def expanded(values: Tensor, side: int) -> Tensor:
    """Every value side·side times: (B, h, w, ...) -> (B, h·side, w·side, ...)."""
    return values.repeat_interleave(side, 1).repeat_interleave(side, 2)


register(
    "flat_study",
    merge_flat,
    place="before",
    layers=(1,),
    limits=Option((0.0, 0.0), "Signal below which a window of 4, of 2 patches per side merges.", type=Number(), many=2),
    signal=Option(SIGNALS[0], "Signal of a window.", type=Choice(SIGNALS)),
    embedding=Option(EMBEDDINGS[0], "Embedding of a window.", type=Choice(EMBEDDINGS)),
)


def keep_images(run: Run) -> None:
    """Keep the images of a pass where the method finds them."""

    def keep(embed: Any, given: tuple[Tensor, ...]) -> None:
        run.model.encoder.study_images = given[0]

    run.model.encoder.patch_embed.register_forward_pre_hook(keep)


@click.command(cls=Command)
@checkpoint_argument
@dataset_argument
@click.option(
    "--sizes", type=Listed(int), default="336,448,504", show_default=True, help="Shorter sides of the images, pixels."
)
@out_option
@device_option
@click.option("--max-images", type=click.IntRange(min=1), help="Images to score, spread over all.  [default: all]")
def main(
    checkpoint: Path, dataset_name: str, sizes: tuple[int, ...], out: Path, device: torch.device, max_images: int | None
) -> None:
    """Score CHECKPOINT on DATASET with flat windows as one patch each, and with smaller images, without training."""
    run = Run.load(checkpoint, device=device, amp=False, patch_type=PURE)
    found = []
    for size in tqdm(sizes, desc="sizes", leave=False):
        plain = run.with_settings(PURE, {}, size)
        found.append({"im_size": size, "label": "not merged", **scored(plain, dataset_name, max_images)})
        for signal in SIGNALS:
            known = signals_of(plain, dataset_name, signal)
            for share in SHARES:
                limits = [float(values.quantile(share)) for values in known]
                for embedding in EMBEDDINGS:
                    options = {"limits": limits, "signal": signal, "embedding": embedding}
                    own = run.with_settings("flat_study", options, size)
                    keep_images(own)
                    row = {"im_size": size, "signal": signal, "share": share, "embedding": embedding, "limits": limits}
                    label = f"{100 * share:g} % of the windows, by {signal}, {embedding}"
                    found.append(row | {"label": label, **scored(own, dataset_name, max_images)})
    append("size", "flat", found, device, out, images=max_images)
    columns = {"shorter side": "{im_size}", "variant": "{label}", "GFLOPs": "{gflops:.1f}", "mIoU": "{mean_iou:.2f}"}
    click.echo(markdown(columns | {"small classes": "{small_iou:.1f}"}, found))


VIEWS = 8  # images for limits and operations


def signals_of(run: Run, dataset: str, signal: str) -> list[Tensor]:
    """The signals of all windows of some images, per side."""
    pixels, views = run.model.patch_size[0], [*run.views(dataset, VIEWS)]
    return [torch.cat([window_signal(view, side, pixels, signal).flatten() for view in views]) for side in SIDES]


def scored(run: Run, dataset: str, max_images: int | None) -> dict[str, Any]:
    """Scores, and mean operations."""
    scores = run.evaluate(dataset=dataset, n_images=max_images)
    known = dict(zip(run.classes, scores["per_class_iou"], strict=True))
    operations = [count_operations(run.model, view).total for view in run.views(dataset, VIEWS)]
    return {
        "mean_iou": scores["mean_iou"],
        "small_iou": sum(known[one] for one in SMALL) / len(SMALL),
        "gflops": sum(operations) / len(operations),
    }


if __name__ == "__main__":
    main()
