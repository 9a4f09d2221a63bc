"""PiToMe (NeurIPS 2024, arXiv 2405.16148): tokens in large clusters merge, isolated ones are protected by energy."""

import torch
from torch import Tensor

from g2tm.matching import best_partners
from g2tm.reduction import Grouping, one_by_one
from g2tm.selection import batch_and_length, falling, own_positions, rows, selection
from g2tm.similarity import chunks, exact_product, most_similar, unit_vectors
from g2tm.validation import check_choice, check_r

VARIANTS = ("bsm", "energy")


def energy_margin(layer: int, depth: int, paper: bool = False) -> float:
    """Similarity above which a neighbor adds to the energy; it falls with the layers, from 1 to `depth`.

    paper: begin at 0.9 (the paper, section 3.2), not at 0.75 (the published code).
    """
    return (0.9 if paper else 0.75) * (1 - (layer - 1) / depth)


def matches_all(layer: int, depth: int) -> bool:
    """Return whether a block, 1-based, uses the variant "bsm" in the published code: the first half of them does."""
    return layer <= (depth + 1) // 2


@one_by_one
@selection
def pitome(
    metric: Tensor,
    *,
    r: int,
    margin: float,
    variant: str = "energy",
    sizes: Tensor | None = None,
    padding: Tensor | None = None,
    paper: bool = False,
) -> Grouping:
    """Merge the tokens of highest energy.

    The order is, with "energy": protected tokens, then destinations, by falling energy; with "bsm": the even ranks
    that stay, by falling similarity, then the odd ranks by falling energy.

    Args:
        metric, r, sizes, padding: see `g2tm`.
        margin: see `energy_margin`.
        variant: "energy" (the paper): of the 2r tokens of highest energy every second one merges into the most
            similar of the others. "bsm": of all tokens, ranked by energy, every second one has a most similar one
            among the others, and the r most similar pairs merge.
        paper: take the energy of the paper, see `energies`.
    """
    check_r(r)
    check_choice("variant", variant, VARIANTS)
    n_images, n_tokens = batch_and_length(metric)
    r = min(r, n_tokens // 2)
    if r == 0 or n_images == 0:
        return Grouping.identity(metric, sizes)
    unit = unit_vectors(metric)
    order = falling(energies(unit, margin, paper))
    ranked, even, others = rows(unit, order), order[:, ::2], order[:, 1::2]
    if variant == "energy":
        sources, others, stay = even[:, :r], others[:, :r], order[:, 2 * r :]
        _, partner = most_similar(ranked[:, : 2 * r : 2], ranked[:, 1 : 2 * r : 2])
    else:
        similarity, partner = best_partners(ranked, odd_first=False)
        by_similarity = falling(similarity)
        merging, stay = by_similarity[:, :r], even.gather(1, by_similarity[:, r:])
        sources, partner = even.gather(1, merging), partner.gather(1, merging)
    target = own_positions(metric).scatter(1, sources, others.gather(1, partner))
    return Grouping.of_targets(target, torch.cat([stay, others], 1), sizes)


def energies(unit: Tensor, margin: float, paper: bool = False) -> Tensor:
    """Measure how much each token has in common with all others, on average (section 3.2): (B, T).

    Args:
        unit: (B, T, D), normalized.
        margin: m. A similarity c counts as c - m above it, and as exp(c - m) - 1 below.
        paper: count c itself above the margin.
    """
    energy = []
    for part in chunks(unit, unit.shape[1]):
        beyond = exact_product(part, unit.mT).sub_(margin)
        above = beyond.clamp(min=0)
        if paper:
            above += margin * (beyond > 0)
        below = beyond.clamp_(max=0).exp_().sub_(1)  # `elu`, which takes 20 times as long on the CPU
        energy.append(above.add_(below).mean(2))
    return torch.cat(energy, 1)
