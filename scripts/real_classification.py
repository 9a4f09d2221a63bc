"""One accuracy that is real: k nearest neighbors on features of a frozen backbone, on scikit-learn's digits."""

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import patch
from patch.trials import interleaved_trials
from segm.data import normalize
from segm.merging import PURE

SIDE, BATCH = 112, 16  # pixels, images per pass
NEIGHBORS, TEMPERATURE = 20, 0.07  # as DINO scores its features (Caron et al., 2021, appendix F)


def digits(normalization: str, most: int | None = None) -> tuple[Tensor, Tensor]:
    """Images (n, 3, SIDE, SIDE), normalized, and labels (n,): the 1,797 handwritten digits of 8×8 pixels, enlarged."""
    found = load_digits()
    coarse = torch.from_numpy(found.images[:most]).float()[:, None] / 16
    smooth = F.interpolate(coarse, (SIDE, SIDE), mode="bicubic").clamp(0, 1)
    gray = (255 * smooth[:, 0]).round().byte().numpy()
    images = torch.stack([normalize(np.repeat(one[..., None], 3, axis=2), normalization) for one in gray])
    return images, torch.from_numpy(found.target[:most]).long()


@torch.inference_mode()
def features_of(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """CLS tokens of unit length, (n, D)."""
    found = [model.forward_features(batch.to(device))[:, 0].float().cpu() for batch in images.split(BATCH)]
    return F.normalize(torch.cat(found), dim=-1)


def knn_accuracy(known: Tensor, labels: Tensor, asked: Tensor, truth: Tensor) -> float:
    """Percent of the features (n, D) whose nearest neighbors, weighted by their similarity, vote for the truth."""
    similarity, nearest = (asked @ known.T).topk(min(NEIGHBORS, len(known)))
    votes = torch.zeros(len(asked), int(labels.max()) + 1)
    votes.scatter_add_(1, labels[nearest], (similarity / TEMPERATURE).exp())
    return 100 * (votes.argmax(1) == truth).double().mean().item()


def classify(
    encoder: Any,
    normalization: str,
    methods: Sequence[str],
    shares: Sequence[float],
    device: torch.device,
    most: int | None = None,
) -> list[dict[str, Any]]:
    """Accuracy of an encoder without merging and with methods that take r, near shares of the tokens left at the end.

    Every other image is asked about, the others are known. Features of both come from the same merged model.

    Returns:
        List of dicts: `method`, `share` that is left with r, `r`, `accuracy` (percent), `images_per_second` of the
        encoder, interleaved.
    """
    images, labels = digits(normalization, most)
    n_patches = math.prod(side // size for side, size in zip((SIDE, SIDE), encoder.patch_embed.patch_size, strict=True))
    depth = len(encoder.blocks)
    rows: list[dict[str, Any]] = [{"method": PURE, "share": 1.0, "r": 0}]
    for method in methods:
        for share in shares:
            r = round((1 - share) * n_patches / depth)
            rows.append({"method": method, "share": 1 - r * depth / n_patches, "r": r})
    calls = {}
    for index, row in enumerate(tqdm(rows, desc="classification", unit="row", leave=False)):
        model = copy.deepcopy(encoder)
        if row["method"] != PURE:
            patch.apply(model, row["method"], r=row["r"])
        found = features_of(model, images, device)
        row["accuracy"] = knn_accuracy(found[::2], labels[::2], found[1::2], labels[1::2])
        calls[index] = model.forward_features
    trials = interleaved_trials(calls, [images[:BATCH].to(device)], device, repeats=5, warm=True)
    for index, row in enumerate(rows):
        row["images_per_second"] = trials[index].quantile(0.5).item()
    return rows
