"""Mutual pairs (MPM, arXiv 2604.05718): tokens that are each other's most similar token become one."""

import torch
from torch import Tensor

from g2tm.reduction import Grouping
from g2tm.selection import batch_and_length, ranks, selection, statically_true, tokens_in
from g2tm.similarity import LOWEST, diagonal, most_similar, unit_vectors
from g2tm.validation import check_batch


@selection
def mutual_pairs(
    x: Tensor, *, sizes: Tensor | None = None, padding: Tensor | None = None, batch: str = "ragged"
) -> Grouping:
    """Merge every pair of tokens that are each other's most similar token by cosine, of equal ones the first (MPM).

    No threshold and nothing learned. Tokens that are not finite stay alone. Groups are in the order of their first
    token. x, sizes, padding, batch: see `g2tm`.
    """
    check_batch(batch)
    n_images, n_slots = batch_and_length(x)
    if n_images == 0 or statically_true(n_slots < 2):
        return Grouping.identity(x, sizes, padding)
    similarity, partner = _partners(x, padding)
    position = torch.arange(n_slots, device=x.device)
    mutual = partner.gather(1, partner) == position
    first = mutual & (partner > position) & (similarity > LOWEST)
    n_pairs = first.sum(1)
    if batch == "uniform":
        n_pairs = n_pairs.min().expand_as(n_pairs)
        first = ranks(similarity.masked_fill(~first, LOWEST)) < n_pairs[:, None]
    second = mutual & first.gather(1, partner)
    slot = (~second).cumsum(1) - 1
    assignment = torch.where(second, slot.gather(1, partner), slot)
    return Grouping.of_counts(assignment, tokens_in(x, padding) - n_pairs, sizes, padding)


def _partners(x: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """Every token's most similar other token: its similarity and its index, (B, N) each.

    The similarity is -inf for tokens that are padding, not finite, or have no other.
    """
    unit = unit_vectors(x)
    unseen = ~unit.isfinite().all(-1)
    unseen = unseen if padding is None else unseen | padding
    unit = unit.masked_fill(unseen.unsqueeze(-1), 0)

    def exclude_itself(product: Tensor, first: int) -> None:
        product.masked_fill_(diagonal(product, first), LOWEST)

    similarity, partner = most_similar(unit, unit, unseen, exclude_itself)
    return similarity.masked_fill(unseen, LOWEST), partner
