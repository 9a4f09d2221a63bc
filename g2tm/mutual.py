"""Mutual pairs (MPM, arXiv 2604.05718): tokens that are each other's most similar token become one."""

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import Grouping
from g2tm.selection import LOWEST, images_in, itself, most_similar, precise, ranks, selection, surely
from g2tm.validation import check_batch


@selection
def mutual_pairs(x: Tensor, *, sizes: Tensor | None = None, batch: str = "ragged") -> Grouping:
    """Merge every pair of tokens that are each other's most similar token (MPM).

    No threshold and nothing learned. Tokens that are not finite stay alone.

    Args:
        x: (B, N, D), patch tokens, compared by cosine; of equally similar ones the first counts.
        sizes: (B, N), patches that each token carries, 0 for padding, which must come last; None: one each.
        batch: "ragged": every image merges all of its pairs. "uniform": every image merges as many as the image
            that has fewest, the most similar ones.

    Returns:
        A `Grouping`; groups are in the order of their first token.

    Raises:
        ValueError: a batch mode that is not allowed.
    """
    check_batch(batch)
    if images_in(x) == 0 or surely(x.shape[1] < 2):
        return Grouping.identity(x, sizes)
    present = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if sizes is None else sizes > 0
    similarity, partner = _partners(x, present)
    position = torch.arange(x.shape[1], device=x.device)
    mutual = partner.gather(1, partner) == position
    first = mutual & (partner > position) & (similarity > LOWEST)
    n_pairs = first.sum(1)
    if batch == "uniform":
        n_pairs = n_pairs.min().expand_as(n_pairs)
        first = ranks(similarity.masked_fill(~first, LOWEST)) < n_pairs[:, None]
    second = mutual & first.gather(1, partner)
    place = (~second).cumsum(1) - 1
    assignment = torch.where(second, place.gather(1, partner), place)
    # Padding carries no weight and goes anywhere.
    return Grouping.of_counts(assignment * present, present.sum(1) - n_pairs, sizes)


def _partners(x: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """Every token's most similar other token.

    Args:
        x: (B, N, D).
        present: (B, N), bool, False for padding.

    Returns:
        similarity: (B, N), -inf for tokens that are padding, not finite, or have no other; partner: (B, N), index.
    """
    unit = F.normalize(precise(x), dim=-1)
    unseen = ~(present & unit.isfinite().all(-1))
    unit = unit.masked_fill(unseen.unsqueeze(-1), 0)

    def exclude(product: Tensor, first: int) -> None:
        product.masked_fill_(unseen[:, None], LOWEST)
        product.masked_fill_(itself(product, first), LOWEST)

    similarity, partner = most_similar(unit, unit, exclude)
    return similarity.masked_fill(unseen, LOWEST), partner
