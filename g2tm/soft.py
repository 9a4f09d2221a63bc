"""The soft way back of Expedit (NeurIPS 2022, arXiv 2210.01035): every patch is a mix of its k nearest tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.selection import at_least_float32, images_in, rows, without_autocast
from g2tm.similarity import chunks, exact_product
from g2tm.validation import check_choice

WEIGHTINGS = ("euclidean", "published", "sum")
EPSILON = 1e-12  # floor of a norm of weights


def nearest_weights(
    x: Tensor, tokens: Tensor, *, k: int, temperature: float, weighting: str = "sum"
) -> tuple[Tensor, Tensor]:
    """The k tokens that are nearest to every patch by squared distance, and what each counts in it.

    Their values exp(-temperature · distance) are divided by their Euclidean norm, as in the paper's code ("published",
    "euclidean"), or by their sum, which keeps constants ("sum"). Where all tokens are far, "published" fades to zero;
    the others take distances from that of the nearest token. Gradients reach x and tokens.

    Args:
        x, tokens: (B, N, D) and (B, M, D).
        k: how many; M if that is less; -1: all.
        temperature: the factor of the distance; larger is sharper.
        weighting: see above.

    Returns:
        Positions and weights, (B, N, k) each, the nearest token first; int64, at least float32.

    Raises:
        ValueError: no number of tokens, or another weighting.
    """
    check_mix(k, weighting)
    x, tokens = at_least_float32(x), at_least_float32(tokens)
    width = int(tokens.shape[1])
    k = width if k < 0 else min(k, width)
    with without_autocast(x):
        norms, transposed, found = tokens.square().sum(-1).unsqueeze(1), tokens.transpose(1, 2), []
        for part in chunks(x, width):
            nearness = 2 * exact_product(part, transposed) - norms - part.square().sum(-1, keepdim=True)
            found.append(nearness.topk(k))
        nearness, nearest = (torch.cat(values, 1) for values in zip(*found, strict=True))
        logits = temperature * nearness
        if weighting == "sum":
            return nearest, logits.softmax(-1)
        if weighting == "euclidean":
            logits = logits - logits[..., :1].detach()
        return nearest, F.normalize(logits.exp(), dim=-1, eps=EPSILON)


def check_mix(k: int, weighting: str) -> None:
    """Raise a ValueError for a number of tokens or a weighting that is not allowed."""
    check_choice("weighting", weighting, WEIGHTINGS)
    if k == 0 or k < -1:
        raise ValueError(f"k {k!r}: give a number of tokens from 1, or -1 for all")


def mix(y: Tensor, nearest: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows, never with all of them in memory: (B, M, D), two (B, N, k) -> (B, N, D)."""
    values = at_least_float32(y)
    weights = weights.to(values.dtype)
    if _has_bags():
        offsets = torch.arange(images_in(y), device=y.device)[:, None, None] * y.shape[1]
        bags = (nearest + offsets).flatten(0, 1), values.flatten(0, 1)
        mixed = F.embedding_bag(*bags, per_sample_weights=weights.flatten(0, 1), mode="sum")
        return mixed.unflatten(0, nearest.shape[:2]).to(y.dtype)
    members = rows(values, nearest.flatten(1)).unflatten(1, nearest.shape[1:])
    return (weights.unsqueeze(2) @ members).squeeze(2).to(y.dtype)


def _has_bags() -> bool:
    """Return whether sums of rows may run as one kernel, which exports and `torch.func` know badly."""
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return not (torch.jit.is_tracing() or torch._C._are_functorch_transforms_active())
