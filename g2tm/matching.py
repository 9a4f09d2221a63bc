"""Bipartite soft matching: ToMe (section 3) with a fixed number of merges, ALGM's global merging (GBM, section 3.3)
with a threshold."""

import torch
import torch.nn.functional as F

from g2tm.reduction import Reduction
from g2tm.selection import first_maximum, selection
from g2tm.validation import check_batch, check_threshold

ADAPTIVE = "adaptive"
# Similarities that are held at once, in numbers: bounds the memory of long sequences.
MAX_SIMILARITIES = 2**24


@selection
def bipartite(metric, *, r=None, threshold=None, layer=None, sizes=None, prefix=1, batch="ragged", padded=True):
    """Merge tokens at even positions (A) into their most similar token at an odd position (B).

    Args:
        metric: (B, L, D), what tokens are compared by (cosine); the whole sequence, prefix tokens first.
        r: merge the r most similar pairs, at most half of the patch tokens; tokens that are not finite come last.
        threshold: instead, merge the pairs whose similarity exceeds it; from -1 to 1, or "adaptive": the mean of the
            A tokens' best similarities plus their standard deviation divided by `layer`.
        layer: 1-based layer, for the adaptive threshold.
        sizes: (B, L), patches that each token carries, 0 for padding, which must come last; None: one each.
        prefix: number of prefix tokens, which neither merge nor are merged into.
        batch: "ragged": every image merges what it has to. "uniform", with a threshold: every image merges as many
            pairs as the image that merges least, and the adaptive threshold is the mean over the images; r is the
            same for all images anyway.
        padded: False if `sizes` marks no padding: with r, there is then nothing to wait for on the device.

    Returns:
        A `Reduction` of the whole sequence: prefix tokens, A tokens that stay, B tokens, each in their old order.

    Raises:
        ValueError: not exactly one of r and threshold, or a value that is not allowed.
    """
    n_images, length = metric.shape[:2]
    _check(r, threshold, layer, prefix, length)
    check_batch(batch)
    padded = padded and sizes is not None
    position = torch.arange(length, device=metric.device)
    patch = (position >= prefix) & (sizes > 0) if padded else (position >= prefix).expand(n_images, -1)
    sources, targets = patch[:, ::2], patch[:, 1::2]
    if targets.shape[1] == 0:
        return Reduction.of_counts(position.expand(n_images, -1).contiguous(), patch.sum(1) + prefix, sizes)
    similarity, partner = best_partners(metric, sources, targets if padded or prefix > 1 else None)
    if r is None:
        n_merges = _count_above(similarity, sources, threshold, layer, batch)
    else:
        n_merges = (patch.sum(1) // 2).clamp(max=r)
        similarity = similarity.masked_fill(sources & similarity.isinf(), -2)  # not finite, but before prefix tokens
    order = similarity.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
    )
    assignment = _assign(rank < n_merges[:, None], partner, patch, prefix)
    if padded:  # padding carries no weight and goes anywhere
        assignment[:, prefix:] *= patch[:, prefix:]
    counts = patch.sum(1) + prefix - n_merges
    if r is None or padded:
        return Reduction.of_counts(assignment, counts, sizes)
    return Reduction(assignment, counts, int(length) - min(r, (int(length) - prefix) // 2), sizes)


def best_partners(metric, sources, targets):
    """Most similar B token of every A token.

    Args:
        metric: (B, L, D).
        sources: (B, ceil(L/2)), bool, A tokens that may merge.
        targets: (B, floor(L/2)), bool, B tokens that may be merged into; None: all.

    Returns:
        similarity: (B, ceil(L/2)), -inf where there is no source or no target; partner: index among the B tokens.
    """
    metric = metric if metric.dtype == torch.float64 else metric.float()
    metric = F.normalize(metric, dim=-1)
    a, b = metric[:, ::2], metric[:, 1::2].transpose(1, 2)
    lowest = float("-inf")
    rows = max(1, MAX_SIMILARITIES // (len(metric) * b.shape[2]))
    best = []
    for part in a.split(rows, dim=1):
        product = part @ b
        best.append(first_maximum(product if targets is None else product.masked_fill_(~targets.unsqueeze(1), lowest)))
    similarity, partner = best[0] if len(best) == 1 else (torch.cat(parts, dim=1) for parts in zip(*best, strict=True))
    similarity = similarity.clamp(-1, 1).masked_fill(~sources | similarity.isinf(), lowest)
    return similarity.nan_to_num(nan=lowest, neginf=lowest), partner  # NaN would sort as the most similar


def adaptive_threshold(similarity, sources, layer):
    """Mean + (unbiased) standard deviation / layer of the best similarities of each image.

    Args:
        similarity, sources: (B, A), see `best_partners`.

    Returns:
        (B, 1).
    """
    known = sources & torch.isfinite(similarity)
    count = known.sum(1, keepdim=True)
    values = similarity.masked_fill(~known, 0)
    mean = values.sum(1, keepdim=True) / count.clamp(min=1)
    variance = ((values - mean).square() * known).sum(1, keepdim=True) / (count - 1).clamp(min=1)
    return mean + variance.sqrt() / layer


def _count_above(similarity, sources, threshold, layer, batch):
    """Number of pairs that exceed the threshold in each image: (B,), int64."""
    if threshold == ADAPTIVE:
        threshold = adaptive_threshold(similarity, sources, layer)
        threshold = threshold.mean() if batch == "uniform" else threshold
    count = (similarity > threshold).sum(1)
    return count.min().expand_as(count) if batch == "uniform" else count


def _assign(merging, partner, patch, prefix):
    """Prefix tokens, then A tokens that stay, then B tokens.

    Args:
        merging: (B, A), bool, A tokens that merge.
        partner: (B, A), index among the B tokens.
        patch: (B, L), bool, neither prefix nor padding.

    Returns:
        (B, L), int64.
    """
    stays = patch.clone()
    stays[:, ::2] &= ~merging
    from_a, from_b = stays.clone(), stays.clone()
    from_a[:, 1::2] = False
    from_b[:, ::2] = False
    place_a = prefix + from_a.cumsum(1) - 1
    place_b = prefix + from_a.sum(1, keepdim=True) + from_b.cumsum(1) - 1
    assignment = torch.where(from_a, place_a, place_b)
    target = place_b[:, 1::2].gather(1, partner)
    assignment[:, ::2] = torch.where(merging, target, assignment[:, ::2])
    assignment[:, :prefix] = torch.arange(prefix, device=patch.device)
    return assignment


def _check(r, threshold, layer, prefix, length):
    if (r is None) == (threshold is None):
        raise ValueError("bipartite matching takes either r or threshold: give one of them")
    if r is not None and (isinstance(r, bool) or not isinstance(r, int) or r < 0):
        raise ValueError(f"r {r!r}: give the number of tokens that a layer removes, 0 or more")
    if threshold == ADAPTIVE:
        if not isinstance(layer, int) or layer < 1:
            raise ValueError(f"layer {layer!r}: the adaptive threshold needs the 1-based layer")
    elif threshold is not None:
        check_threshold(threshold)
    if not 0 <= prefix <= length:
        raise ValueError(f"prefix {prefix}: give the number of prefix tokens, from 0 to all {length}")
