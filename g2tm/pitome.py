"""PiToMe (NeurIPS 2024, arXiv 2405.16148): tokens in large clusters merge, isolated ones are protected by energy."""

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.matching import best_partners
from g2tm.reduction import Grouping
from g2tm.selection import chunks, images_in, most_similar, precise, rows, selection
from g2tm.validation import check_r

VARIANTS = ("bsm", "energy")


def energy_margin(layer: int, depth: int, paper: bool = False) -> float:
    """Similarity above which a neighbor adds to the energy; it falls with the layers.

    Args:
        layer: 1-based.
        depth: number of blocks.
        paper: whether it begins at 0.9 (the paper, section 3.2) or at 0.75 (the published code).
    """
    first = 0.9 if paper else 0.75
    return first - first * (layer - 1) / depth


def matches_all(layer: int, depth: int) -> bool:
    """Whether a block uses the variant "bsm" in the published code: the first half of them does. 1-based."""
    return layer <= (depth + 1) // 2


@selection
def pitome(
    metric: Tensor,
    *,
    r: int,
    margin: float,
    variant: str = "energy",
    sizes: Tensor | None = None,
    prefix: int = 1,
    paper: bool = False,
) -> Grouping:
    """Merge the tokens of highest energy.

    Args:
        metric: (B, L, D), what tokens are compared by (cosine); the whole sequence, prefix tokens first.
        r: number of tokens to remove, at most half of the patch tokens.
        margin: see `energy_margin`.
        variant: "energy" (the paper): of the 2r tokens of highest energy every second one merges into the most
            similar of the others. "bsm": of all tokens, ranked by energy, every second one has a most similar one
            among the others, and the r most similar pairs merge.
        sizes: (B, L), patches that each token carries; None: one each.
        prefix: number of prefix tokens, which take no part.
        paper: whether energy is that of the paper, see `energies`.

    Returns:
        A `Grouping` of the whole sequence. After the prefix tokens: "energy": protected tokens, then destinations, by
        falling energy; "bsm": the even ranks that stay, by falling similarity, then the odd ranks by falling energy.

    Raises:
        ValueError: an unknown variant, or r is no number of tokens.
    """
    check_r(r)
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: choose {' or '.join(VARIANTS)}")
    n_patches = metric.shape[1] - prefix
    r = min(r, n_patches // 2)
    if r == 0 or images_in(metric) == 0:
        return Grouping.identity(metric, sizes)
    patches = F.normalize(precise(metric[:, prefix:]), dim=-1)
    order = energies(patches, margin, paper).argsort(dim=1, descending=True, stable=True)
    ranked = rows(patches, order)
    if variant == "energy":
        sources, others = order[:, : 2 * r : 2], order[:, 1 : 2 * r : 2]
        _, partner = most_similar(ranked[:, : 2 * r : 2], ranked[:, 1 : 2 * r : 2])
        stay = order[:, 2 * r :]
    else:
        similarity, partner = best_partners(ranked, 0)
        even, others = order[:, ::2], order[:, 1::2]
        by_similarity = similarity.argsort(dim=1, descending=True, stable=True)
        merging, staying = by_similarity[:, :r], by_similarity[:, r:]
        sources, partner = even.gather(1, merging), partner.gather(1, merging)
        stay = even.gather(1, staying)
    position = torch.arange(metric.shape[1], device=metric.device).repeat(images_in(metric), 1)
    target = position.scatter(1, prefix + sources, prefix + others.gather(1, partner))
    return Grouping.of_targets(target, torch.cat([position[:, :prefix], prefix + stay, prefix + others], 1), sizes)


def energies(unit: Tensor, margin: float, paper: bool = False) -> Tensor:
    """How much each token has in common with all others (section 3.2).

    Args:
        unit: (B, T, D), normalized.
        margin: m. A similarity c counts as c - m above it, and as exp(c - m) - 1 below.
        paper: count c itself above the margin.

    Returns:
        (B, T), the mean over all T tokens.
    """
    energy = []
    for part in chunks(unit, unit.shape[1]):
        beyond = (part @ unit.mT).sub_(margin)
        above = beyond.clamp(min=0)
        if paper:
            above += margin * (beyond > 0)
        below = beyond.clamp_(max=0).exp_().sub_(1)  # `elu`, which takes 20 times as long on the CPU
        energy.append(above.add_(below).mean(2))
    return torch.cat(energy, 1)
