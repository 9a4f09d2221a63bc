"""Effects of thresholds on the features of a real model: similarities per layer, tokens left, purity of groups."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

import patch
from g2tm import Grouping
from segm.data import IGNORE_LABEL, Sample
from segm.data.images import resize_to
from segm.run import Run
from segm.similarity import patches_of_pixels
from vis import outline_tokens, picture_sheet


@torch.inference_mode()
def similarities(run: Run, samples: Sequence[Sample], layers: Sequence[int]) -> dict[int, list[tuple[Any, Any]]]:
    """Similarities of neighboring patches, layer by layer, of an unpatched run.

    Returns:
        layer -> per image (right (gh, gw-1), down (gh-1, gw)), float32.
    """
    found: dict[int, list[tuple[Any, Any]]] = {}
    for layer in tqdm(layers, desc="similarities", unit="layer", leave=False):
        with patch.edges(run.model.encoder, layer) as edges:
            for sample in samples:
                run.model.grid_logits(run.preprocess_resized(sample.image))
                pair = edges["right"][0].cpu().numpy(), edges["down"][0].cpu().numpy()
                found.setdefault(layer, []).append(pair)
    return found


def kept_share(right: np.ndarray, down: np.ndarray, threshold: float) -> float:
    """Share of the tokens that graph merging leaves of one image at a threshold."""
    gh, gw = len(right), down.shape[1]
    index = np.arange(gh * gw).reshape(gh, gw)
    across, below = right >= threshold, down >= threshold
    start = np.concatenate([index[:, :-1][across], index[:-1][below]])
    end = np.concatenate([index[:, 1:][across], index[1:][below]])
    graph = coo_array((np.ones(len(start)), (start, end)), shape=(gh * gw, gh * gw))
    return connected_components(graph, directed=False)[0] / (gh * gw)


@torch.inference_mode()
def purity(run: Run, samples: Sequence[Sample]) -> dict[str, Any]:
    """Purity of the groups of a patched run.

    Returns:
        `tokens`, mean per image; `labels_per_group`, mean over the groups of several patches; `best_iou`, the mIoU in
        percent of giving every group the label of most of its pixels, which no decoder can pass that labels tokens;
        `pure`, by class, the share of its pixels that such a map gets right, percent.
    """
    n_cls, counts, labels = run.n_cls, [], []
    confusion = np.zeros((n_cls, n_cls), np.int64)
    for sample in tqdm(samples, desc="purity", unit="image", leave=False):
        assert sample.label is not None
        groups = pixel_groups_of(run, sample)
        known = sample.label != IGNORE_LABEL
        table = np.zeros((groups.max() + 1, n_cls), np.int64)
        np.add.at(table, (groups[known], sample.label[known]), 1)
        sizes = np.bincount(assignment_of(run))
        counts.append(len(sizes))
        merged = sizes > 1
        labels += (table[: len(merged)][merged] > 0).sum(1).tolist()
        np.add.at(confusion, (sample.label[known], table.argmax(1)[groups[known]]), 1)
    hit, truth, given = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    iou = hit / np.maximum(truth + given - hit, 1)
    return {
        "tokens": float(np.mean(counts)),
        "labels_per_group": float(np.mean(labels)) if labels else 1.0,
        "best_iou": 100 * float(iou[truth > 0].mean()),
        "pure": {name: 100 * float(h / t) for name, h, t in zip(run.classes, hit, truth, strict=True) if t},
    }


def pixel_groups_of(run: Run, sample: Sample) -> np.ndarray:
    """Group of every pixel of a photograph, (H, W), after a pass of a patched run over it."""
    run.model.grid_logits(run.preprocess_resized(sample.image))
    assignment = assignment_of(run).reshape(run.model.grid(run.crop_size))
    return assignment[np.ix_(*patches_of_pixels(sample.image.shape, run))]


def assignment_of(run: Run) -> np.ndarray:
    """Token of every patch, (N,), after the last pass of a patched run over one image."""
    reduction = patch.reduction(run.model)
    if not isinstance(reduction, Grouping):
        raise ValueError(f"the tokens of {run.method} are no groups of patches: choose a method that merges")
    return reduction.assignment[0].cpu().numpy()


@torch.inference_mode()
def region_sheet(runs: Mapping[str, Run], samples: Sequence[Sample]) -> np.ndarray:
    """Photographs with the borders of their merged regions, a row per photograph, a column per run."""
    rows, captions = [], []
    for sample in samples:
        row, caption = [], []
        for run in runs.values():
            photo = resize_to(sample.image, run.crop_size)
            grid = run.model.grid(run.crop_size)
            run.model.grid_logits(run.preprocess_resized(sample.image))
            assignment = assignment_of(run)
            row.append(outline_tokens(photo, assignment, grid, run.model.patch_size))
            caption.append(f"{assignment.max() + 1} of {len(assignment)} tokens")
        rows.append(row)
        captions.append(caption)
    return picture_sheet(rows, list(runs), captions)
