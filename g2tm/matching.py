"""Bipartite soft matching: ToMe (section 3) with a fixed number of merges, ALGM's global merging (GBM, section 3.3)
with a threshold."""

from typing import Any

import torch
from torch import Tensor

from g2tm.reduction import Grouping
from g2tm.selection import batch_and_length, images_in, ranks, selection, statically_true, tokens_in
from g2tm.similarity import LOWEST, most_similar, unit_vectors
from g2tm.validation import check_batch, check_r, check_threshold, check_tokens

ADAPTIVE = "adaptive"
UNKNOWN = -2.0  # similarity of tokens that are not finite: below every other, but before what may not merge


@selection
def bipartite(
    metric: Tensor,
    *,
    r: int | None = None,
    threshold: float | str | None = None,
    tokens: int | None = None,
    layer: int | None = None,
    sizes: Tensor | None = None,
    padding: Tensor | None = None,
    odd_first: bool = True,
    batch: str = "ragged",
    keep_order: bool = False,
) -> Grouping:
    """Merge tokens at even positions (A) into their most similar token at an odd position (B).

    The order is: A tokens that stay, then B tokens, each in their old order.

    Args:
        metric, sizes, padding, odd_first: see `g2tm`. Without padding nothing but a threshold waits for the device.
        r: give one of r, threshold and tokens. The r most similar pairs merge, at most half of an image's tokens; those
            that are not finite come last.
        threshold: instead, merge the pairs whose similarity exceeds it; from -1 to 1, or "adaptive": the mean of the
            A tokens' best similarities plus their standard deviation divided by `layer`.
        tokens: instead, merge the most similar pairs until exactly so many tokens are left.
        layer: 1-based layer, for the adaptive threshold.
        batch: see `g2tm`; with "uniform" the adaptive threshold is the mean over the images.
        keep_order: instead, all tokens that stay keep their old order: neighbors on the image then remain near each
            other in the sequence, and the next matching does not find those that stayed on one side again.
    """
    n_images, n_slots = batch_and_length(metric)
    _check(r, threshold, tokens, layer, padding, odd_first, n_slots)
    check_batch(batch)
    if n_images == 0 or statically_true(n_slots < 2):
        return Grouping.identity(metric, sizes, padding)
    lengths = tokens_in(metric, padding)
    similarity, partner = best_partners(metric, odd_first, padding)
    if r is not None:
        n_merges = (lengths // 2).clamp(max=r)
        tokens = n_slots - min(r, n_slots // 2) if padding is None else None
    elif tokens is not None:
        n_merges = lengths - tokens
    else:
        n_merges = count_above(similarity, threshold, layer, batch)
    if keep_order:
        assignment = assign_in_order(similarity, partner, n_merges, odd_first, n_slots)
    else:
        assignment = assign(similarity, partner, n_merges, lengths, odd_first, n_slots)
    if tokens is not None:  # without padding
        return Grouping.of_length(assignment, tokens, sizes)
    return Grouping.of_counts(assignment, lengths - n_merges, sizes, padding)


def sides(odd_first: bool) -> tuple[slice, slice]:
    """The tokens of A, at even positions of the whole sequence, and those of B."""
    return slice(int(odd_first), None, 2), slice(1 - int(odd_first), None, 2)


def best_partners(metric: Tensor, odd_first: bool = True, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the most similar B token of every A token: its similarity, and its index among those of B, (B, A) each.

    B has at least one token. The similarity is at most 1, `UNKNOWN` where a token is not finite or an image has no B
    token, -inf for padding.
    """
    unit, (a, b) = unit_vectors(metric), sides(odd_first)
    similarity, partner = most_similar(unit[:, a], unit[:, b], None if padding is None else padding[:, b])
    similarity = similarity.nan_to_num(nan=UNKNOWN, neginf=UNKNOWN).clamp_(max=1)  # NaN would sort as the most similar
    return similarity if padding is None else similarity.masked_fill(padding[:, a], LOWEST), partner


def adaptive_threshold(similarity: Tensor, layer: int) -> Tensor:
    """Mean + (unbiased) standard deviation / layer of the best similarities of each image: (B, 1).

    similarity: (B, A), see `best_partners`; `UNKNOWN` and -inf do not count.
    """
    known = similarity > UNKNOWN
    count = known.sum(1, keepdim=True)
    values = similarity.masked_fill(~known, 0)
    mean = values.sum(1, keepdim=True) / count.clamp(min=1)
    variance = ((values - mean).square() * known).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return mean + variance.sqrt() / layer


def count_above(similarity: Tensor, threshold: Any, layer: Any, batch: str) -> Tensor:
    """Number of pairs that exceed the threshold in each image: (B,), int64."""
    if threshold == ADAPTIVE:
        threshold = adaptive_threshold(similarity, layer)
        threshold = threshold.mean() if batch == "uniform" else threshold
    count = (similarity > threshold).sum(1)
    return count.min().expand_as(count) if batch == "uniform" else count


def assign(
    similarity: Tensor, partner: Tensor, n_merges: Tensor, lengths: Tensor, odd_first: bool, n_slots: int
) -> Tensor:
    """Merge the most similar pairs: the assignment, (B, N), to A tokens that stay, then B tokens.

    similarity, partner: see `best_partners`; n_merges, lengths: (B,), of pairs, and of tokens that are no padding;
    n_slots: N. Padding gets any number below N.
    """
    merging, (a, b) = ranks(similarity) < n_merges[:, None], sides(odd_first)
    first_b = (lengths + int(not odd_first)) // 2 - n_merges  # the A tokens that stay come before
    slot_a = (~merging).cumsum(1) - 1
    slot_b = torch.arange(n_slots - similarity.shape[1], device=similarity.device) + first_b[:, None]
    assignment = slot_a.new_empty(images_in(slot_a), n_slots)
    assignment[:, b] = slot_b
    assignment[:, a] = torch.where(merging, slot_b.gather(1, partner), slot_a)
    return assignment


def assign_in_order(similarity: Tensor, partner: Tensor, n_merges: Tensor, odd_first: bool, n_slots: int) -> Tensor:
    """As `assign`, to all tokens that stay, in their old order."""
    merging, (a, b) = ranks(similarity) < n_merges[:, None], sides(odd_first)
    stays = torch.ones(images_in(merging), n_slots, dtype=torch.bool, device=merging.device)
    stays[:, a] = ~merging
    slot = stays.cumsum(1) - 1
    assignment = slot.clone()
    assignment[:, a] = torch.where(merging, slot[:, b].gather(1, partner), slot[:, a])
    return assignment


def _check(
    r: Any, threshold: Any, tokens: Any, layer: Any, padding: Tensor | None, odd_first: bool, n_slots: int
) -> None:
    if [r, threshold, tokens].count(None) != 2:
        raise ValueError("bipartite matching takes r, threshold or tokens: give exactly one of them")
    if r is not None:
        check_r(r)
    elif tokens is not None:
        check_tokens(tokens, (n_slots + int(odd_first)) // 2 or n_slots, n_slots, padding)
    elif threshold == ADAPTIVE:
        if not isinstance(layer, int) or layer < 1:
            raise ValueError(f"layer {layer!r}: the adaptive threshold needs the 1-based layer")
    else:
        check_threshold(threshold)
