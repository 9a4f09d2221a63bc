"""Bipartite soft matching: ToMe (section 3) with a fixed number of merges, ALGM's global merging (GBM, section 3.3)
with a threshold."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import Grouping
from g2tm.selection import LOWEST, extent, images_in, most_similar, precise, ranks, selection, surely
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
    prefix: int = 1,
    batch: str = "ragged",
    padded: bool = True,
) -> Grouping:
    """Merge tokens at even positions (A) into their most similar token at an odd position (B).

    Args:
        metric: (B, L, D), what tokens are compared by (cosine); the whole sequence, prefix tokens first.
        r: merge the r most similar pairs, at most half of the patch tokens; tokens that are not finite come last.
        threshold: instead, merge the pairs whose similarity exceeds it; from -1 to 1, or "adaptive": the mean of the
            A tokens' best similarities plus their standard deviation divided by `layer`.
        tokens: instead, merge the most similar pairs until exactly so many patch tokens are left, in images without
            padding.
        layer: 1-based layer, for the adaptive threshold.
        sizes: (B, L), patches that each token carries, 0 for padding, which must come last; None: one each.
        prefix: number of prefix tokens, which neither merge nor are merged into.
        batch: "ragged": every image merges what it has to. "uniform", with a threshold: every image merges as many
            pairs as the image that merges least, and the adaptive threshold is the mean over the images; r is the
            same for all images anyway.
        padded: False if `sizes` marks no padding: with r, there is then nothing to wait for on the device. There never
            is with `tokens`.

    Returns:
        A `Grouping` of the whole sequence: prefix tokens, A tokens that stay, B tokens, each in their old order.

    Raises:
        ValueError: not exactly one of r, threshold and tokens, or a value that is not allowed.
    """
    n_images, length = extent(metric)
    _check(r, threshold, tokens, layer, prefix, length)
    check_batch(batch)
    if n_images == 0:
        return Grouping.identity(metric, sizes)
    present = present_tokens(sizes, prefix) if padded and sizes is not None and tokens is None else None
    position = torch.arange(length, device=metric.device)
    n_tokens = position.new_full((n_images,), length) if present is None else present.sum(1)
    if surely(length // 2 == prefix // 2):  # no B token but prefix tokens
        everyone = Grouping.identity(metric, sizes)
        return everyone if present is None else Grouping.of_counts(everyone.assignment * present, n_tokens, sizes)
    similarity, partner = best_partners(metric, prefix, present)
    if threshold is not None:
        n_merges = count_above(similarity, threshold, layer, batch)
    elif tokens is not None:
        n_merges = n_tokens - prefix - tokens
    else:
        n_merges = ((n_tokens - prefix) // 2).clamp(max=r)
    assignment = assign(similarity, partner, n_merges, n_tokens, length, prefix, present)
    if threshold is None and present is None:
        left = prefix + tokens if r is None else length - min(r, (length - prefix) // 2)
        return Grouping.of_length(assignment, left, sizes)
    return Grouping.of_counts(assignment, n_tokens - n_merges, sizes)


def present_tokens(sizes: Tensor, prefix: int) -> Tensor:
    """(B, L), bool: False for padding, which prefix tokens never are."""
    present = sizes > 0
    present[:, :prefix] = True
    return present


def best_partners(metric: Tensor, prefix: int, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Most similar B token of every A token.

    Args:
        metric: (B, L, D).
        prefix: number of prefix tokens, which come first.
        present: (B, L), bool, False for padding, which comes last; None: there is none.

    Returns:
        similarity: (B, ceil(L/2)), at most 1, `UNKNOWN` where a token is not finite or there is no B token, -inf
        for prefix tokens and padding; partner: (B, ceil(L/2)), index among the B tokens.
    """
    metric = F.normalize(precise(metric), dim=-1)

    def exclude(product: Tensor, _: int) -> None:
        if prefix > 1:
            product[:, :, : prefix // 2] = LOWEST
        if present is not None:
            product.masked_fill_(~present[:, None, 1::2], LOWEST)

    similarity, partner = most_similar(metric[:, ::2], metric[:, 1::2], exclude)
    similarity = similarity.nan_to_num(nan=UNKNOWN, neginf=UNKNOWN).clamp_(max=1)  # NaN would sort as the most similar
    similarity[:, : (prefix + 1) // 2] = LOWEST
    if present is not None:
        similarity.masked_fill_(~present[:, ::2], LOWEST)
    return similarity, partner


def adaptive_threshold(similarity: Tensor, layer: int) -> Tensor:
    """Mean + (unbiased) standard deviation / layer of the best similarities of each image.

    Args:
        similarity: (B, A), see `best_partners`; what is `UNKNOWN` or -inf does not count.

    Returns:
        (B, 1).
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
    similarity: Tensor,
    partner: Tensor,
    n_merges: Tensor,
    n_tokens: Tensor,
    length: int,
    prefix: int,
    present: Tensor | None = None,
) -> Tensor:
    """The most similar pairs merge: prefix tokens, then A tokens that stay, then B tokens.

    Args:
        similarity, partner: see `best_partners`.
        n_merges: (B,), number of pairs that merge.
        n_tokens: (B,), number of tokens that are no padding.
        length: L, with padding.
        prefix: number of prefix tokens.
        present: (B, L), bool, False for padding, which goes anywhere, for it carries no weight; None: there is none.

    Returns:
        (B, L), int64.
    """
    merging = ranks(similarity) < n_merges[:, None]
    first_b = (n_tokens + 1) // 2 - n_merges  # the A tokens that stay, prefix tokens included, come before
    position = torch.arange(length, device=similarity.device)
    place_a = (~merging).cumsum(1).add_(prefix // 2 - 1)
    place_b = position[: length // 2] + first_b[:, None]
    assignment = position.new_empty(images_in(merging), length)
    assignment[:, 1::2] = place_b
    assignment[:, ::2] = torch.where(merging, place_b.gather(1, partner), place_a)
    assignment[:, :prefix] = position[:prefix]
    if present is not None:
        assignment[:, prefix:] *= present[:, prefix:]
    return assignment


def _check(r: Any, threshold: Any, tokens: Any, layer: Any, prefix: int, length: int) -> None:
    if [r, threshold, tokens].count(None) != 2:
        raise ValueError("bipartite matching takes r, threshold or tokens: give exactly one of them")
    if prefix < 0 or surely(prefix > length):
        raise ValueError(f"prefix {prefix}: give the number of prefix tokens, from 0 to all {length}")
    if r is not None:
        check_r(r)
    elif tokens is not None:
        n_a, n_b = (length + 1) // 2 - (prefix + 1) // 2, length // 2 - prefix // 2
        check_tokens(tokens, n_b or n_a, n_a + n_b)
    elif threshold == ADAPTIVE:
        if not isinstance(layer, int) or layer < 1:
            raise ValueError(f"layer {layer!r}: the adaptive threshold needs the 1-based layer")
    else:
        check_threshold(threshold)
