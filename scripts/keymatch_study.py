"""The choices in keymatch, one by one, on a trained model: vectors, pairs, order, layers, budgets, attention.

DATASET=… python scripts/keymatch_study.py runs/real/tuned camvid --max-images 51
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from real_results import SMALL
from results_file import append, out_option
from torch import Tensor, nn
from tqdm import tqdm

import g2tm
from g2tm.selection import falling, own_positions, rows, selection, true_positions
from g2tm.similarity import exact_product, unit_vectors
from patch.method import Choice, Number, Option, Step, find, register
from patch.methods.common import METRICS
from patch.operations import count_operations
from segm.cli import Command, checkpoint_argument, dataset_argument, device_option, markdown
from segm.merging import PURE
from segm.run import Run

VECTORS = ("keys", "queries", "values", "tokens", "keys of all heads", "unit keys", "keys and queries")
PAIRS = ("columns", "ToMe's order", "checkerboard", "random", "all")
BASE: dict[str, Any] = {"layers": [2, 3, 4, 6], "tokens": [670, 580, 500, 400]}
TRIED: dict[str, Mapping[str, Any]] = {
    "keymatch": {},
    **{f"vectors: {name}": {"vectors": name} for name in VECTORS[1:]},
    "the mean not taken off": {"center": False},
    **{f"pairs: {name}": {"pairs": name} for name in PAIRS[1:]},
    **{f"less {value:g} per 10 patches squared": {"distance": value} for value in (0.1, 0.3)},
    **{f"{mode} attention": {"attention": mode} for mode in ("proportional", "inverse")},
    "layers 4": {"layers": [4], "tokens": [400]},
    "layers 3, 5": {"layers": [3, 5], "tokens": [560, 400]},
    "layers 1, 2, 3, 5": {"layers": [1, 2, 3, 5], "tokens": [690, 610, 540, 430]},
    "layers 2, 3, 4, 5, 6": {"layers": [2, 3, 4, 5, 6], "tokens": [680, 600, 530, 465, 410]},
    "layers 3, 4, 5, 6": {"layers": [3, 4, 5, 6], "tokens": [640, 530, 440, 360]},
    "layers 2, 4, 6, 8": {"layers": [2, 4, 6, 8], "tokens": [640, 520, 420, 340]},
    "layers 2 to 8": {"layers": [2, 3, 4, 5, 6, 7, 8], "tokens": [700, 632, 564, 496, 428, 360, 292]},
    "falls fast, then slowly": {"tokens": [620, 540, 470, 420]},
    "falls slowly, then fast": {"tokens": [700, 620, 520, 370]},
}


def vectors_of(step: Step) -> Tensor:
    """The vectors that are compared: (B, N, d), float32."""
    name = step.options["vectors"]
    if name in METRICS:
        return step.x if name == "tokens" else getattr(step, name)
    if name == "keys and queries":
        return torch.cat([step.keys, step.queries], -1)
    _, keys, _ = step.block.project(step.normed)  # (B, H, N, d)
    keys = keys.float().transpose(1, 2)
    return keys.flatten(2) if name == "keys of all heads" else nn.functional.normalize(keys, dim=-1).mean(2)


def places(step: Step) -> Tensor:
    """Row and column of every token, (B, N, 2): the mean over its patches."""
    grid = torch.cartesian_prod(*(torch.arange(side) for side in step.grid)).float().expand(len(step.x), -1, -1)
    before = step.encoder.study_steps
    return grid if not before else before[-1].merge(grid)


def merge_variant(step: Step) -> g2tm.Reduction:
    """As keymatch, with other vectors, pairs or similarities."""
    if step.layer == step.options["layers"][0]:
        step.encoder.study_steps = []
    vectors, pairs = vectors_of(step), step.options["pairs"]
    if step.options["center"]:
        vectors = vectors - vectors.mean(1, keepdim=True)
    tokens = step.options["tokens"][step.options["layers"].index(step.layer)]
    if pairs == "all":
        merged = g2tm.crossget(vectors, r=step.x.shape[1] - tokens, **step.given)
    elif pairs == "ToMe's order":
        merged = g2tm.bipartite(vectors, tokens=tokens, odd_first=step.odd_first, **step.given)
    else:
        merged = between_halves(vectors, places(step), pairs, tokens, step.options["distance"], step.sizes)
    before = step.encoder.study_steps
    step.encoder.study_steps = [before[-1].then(merged) if before else merged]
    return merged


@selection
def between_halves(
    vectors: Tensor, where: Tensor, pairs: str, tokens: int, distance: float, sizes: Tensor | None
) -> g2tm.Grouping:
    """Merge tokens of one half into their most similar token of the other; all that stay keep their order."""
    n_images, n_tokens = where.shape[:2]
    number = torch.arange(n_tokens).expand(n_images, -1)
    kinds = {
        "columns": (number + 1) % 2,
        "checkerboard": where.round().sum(-1) % 2,
        "random": torch.rand(n_images, n_tokens, generator=torch.Generator().manual_seed(n_tokens)),
    }
    order = kinds[pairs].argsort(dim=1, stable=True)
    a, b = order[:, : n_tokens // 2], order[:, n_tokens // 2 :]
    unit = unit_vectors(vectors)
    similarity = exact_product(rows(unit, a), rows(unit, b).mT)
    similarity -= distance * torch.cdist(rows(where, a), rows(where, b)).square() / 100
    best, partner = similarity.max(-1)
    chosen = falling(best)[:, : n_tokens - tokens]
    sources, targets = a.gather(1, chosen), b.gather(1, partner.gather(1, chosen))
    target = own_positions(vectors).scatter(1, sources, targets)
    stays = torch.ones(n_images, n_tokens, dtype=torch.bool).scatter(1, sources, False)
    return g2tm.Grouping.of_targets(target, true_positions(stays, tokens), sizes)


register(
    "keymatch_study",
    merge_variant,
    static=True,
    **{name: option for name, option in find("keymatch").options.items() if name in ("tokens", "center")},
    vectors=Option("keys", "Vectors that are compared.", type=Choice(VECTORS)),
    pairs=Option("columns", "Tokens that may become one.", type=Choice(PAIRS)),
    distance=Option(0.0, "Similarity taken off per 10 patches squared.", type=Number(0)),
)


@click.command(cls=Command)
@checkpoint_argument
@dataset_argument
@out_option
@device_option
@click.option("--max-images", type=click.IntRange(min=1), help="Images to score, spread over all.  [default: all]")
def main(checkpoint: Path, dataset_name: str, out: Path, device: torch.device, max_images: int | None) -> None:
    """Score CHECKPOINT on DATASET with variants of keymatch, without training."""
    run = Run.load(checkpoint, device=device, amp=False, patch_type=PURE)
    found = []
    for name, options in tqdm({"not merged": None, **TRIED}.items(), desc="settings", leave=False):
        merging = (PURE, {}) if options is None else ("keymatch_study", BASE | options)
        own = run.with_settings(*merging)
        scores = own.evaluate(dataset=dataset_name, n_images=max_images, boundary=True)
        known = dict(zip(run.classes, scores["per_class_iou"], strict=True))
        small = sum(known[one] for one in SMALL) / len(SMALL)
        (view,) = own.views(dataset_name, 1)
        operations = count_operations(own.model, view).total
        row = {"label": name, "mean_iou": scores["mean_iou"], "small_iou": small, "gflops": operations}
        found.append(row | {"boundary_iou": scores["boundary_iou"]})
    append("methods", "keymatch", found, device, out, images=max_images)
    columns = {"variant": "{label}", "GFLOPs": "{gflops:.1f}", "mIoU": "{mean_iou:.2f}"}
    click.echo(markdown(columns | {"small classes": "{small_iou:.1f}", "boundary IoU": "{boundary_iou:.1f}"}, found))


if __name__ == "__main__":
    main()
