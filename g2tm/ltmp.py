"""Learned thresholds (LTMP, TMLR 2023): merge what is similar enough, then prune what is not important enough."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.masked import Masked, above
from g2tm.matching import assign, best_partners, count_above, present_tokens
from g2tm.pruning import tie_pruned
from g2tm.reduction import Grouping, Reduction
from g2tm.selection import LOWEST, extent, most_similar, precise, ranks, repeated, selection
from g2tm.validation import check_batch, check_share, check_tokens


@selection
def ltmp(
    x: Tensor,
    keys: Tensor,
    *,
    importance: Tensor,
    merge_threshold: float | Tensor,
    prune_threshold: float | Tensor,
    tokens: int | None = None,
    fewest: int = 1,
    sizes: Tensor | None = None,
    prefix: int = 1,
    batch: str = "ragged",
    padded: bool = True,
) -> Reduction:
    """Merge as in `bipartite` every pair above one threshold, then prune every token up to another (section 3).

    A merged token is as important as the most important one in it.

    Args:
        x: (B, L, D), the residual stream; the whole sequence, prefix tokens first.
        keys: (B, L, d), by which tokens are compared (cosine).
        importance: (B, L), attention that each token gets, mean over heads and queries.
        merge_threshold: cosine similarity above which a pair merges, from 0 to 1, or a tensor of one number; 1: none
            does.
        prune_threshold: importance above which a token stays, likewise; 0: all do.
        tokens: keep exactly so many patch tokens, in images without padding. Pairs above the threshold merge, the
            most similar first, as long as there are more; then the least important tokens are pruned, whatever their
            importance. There is nothing to wait for on the device. A number that the image has not: all stay.
        fewest: patch tokens that every image keeps, the most important ones; 0 in the published code.
        sizes: (B, L), patches that each token carries, 0 for padding, which must come last; None: one each.
        prefix: number of prefix tokens, which neither merge nor leave.
        batch: "ragged": every image keeps its own number. "uniform": every image merges as many pairs as the image
            that merges least, and then keeps as many tokens as the image that keeps most.
        padded: False if `sizes` marks no padding.

    Returns:
        A reduction of the whole sequence: prefix tokens, then patch tokens in the order of `bipartite`.

    Raises:
        ValueError: a threshold, number or batch mode that is not allowed.
    """
    for name, threshold in (("merge_threshold", merge_threshold), ("prune_threshold", prune_threshold)):
        if not isinstance(threshold, Tensor):  # which would have to be waited for
            check_share(threshold, name)
    check_batch(batch)
    n_images, length = extent(x)
    if n_images == 0 or length <= prefix:
        return Grouping.identity(x, sizes)
    if tokens is not None:
        check_tokens(tokens, 1, max(length - prefix, tokens))
        tokens = min(tokens, length - prefix)
    present = present_tokens(sizes, prefix) if padded and sizes is not None and tokens is None else None
    merge = _merge(keys, merge_threshold, tokens, sizes, prefix, batch, present)
    importance = _of_groups(importance, merge, prefix, present)
    count = (importance > prune_threshold).sum(1) if tokens is None else merge.counts * 0 + prefix + tokens
    count = torch.minimum(count.clamp(min=prefix + fewest), merge.counts)
    if batch == "uniform":
        count = count.max().expand_as(count)
    if tokens is None:
        lengths, pruned = torch.stack([count, merge.counts - count]).tolist()
    else:
        lengths, pruned = repeated(prefix + tokens, n_images), [length - prefix - tokens]
    return merge.then(_prune(merge.merge(x), importance, count, lengths, max(pruned), merge.sizes, prefix))


def _merge(
    keys: Tensor,
    threshold: float | Tensor,
    tokens: int | None,
    sizes: Tensor | None,
    prefix: int,
    batch: str,
    present: Tensor | None,
) -> Grouping:
    """The first half. Its groups have padding up to L, so that there is nothing to wait for yet."""
    n_images, length = extent(keys)
    n_tokens = torch.full((n_images,), length, device=keys.device) if present is None else present.sum(1)
    if length // 2 == prefix // 2:  # nothing to merge into
        assignment, n_merges = torch.arange(length, device=keys.device).repeat(n_images, 1), n_tokens * 0
    else:
        similarity, partner = best_partners(keys, prefix, present)
        n_merges = count_above(similarity, threshold, None, batch)
        if tokens is not None:
            n_merges = torch.minimum(n_merges, n_tokens - prefix - tokens)
        assignment = assign(similarity, partner, n_merges, n_tokens, length, prefix, present)
    return Grouping(assignment, n_tokens - n_merges, repeated(length, n_images), sizes, width=length)


def _of_groups(importance: Tensor, merge: Grouping, prefix: int, present: Tensor | None) -> Tensor:
    """The largest importance in every group, (B, L); infinite for prefix tokens, -inf for padding."""
    importance = importance.float()
    if present is not None:
        importance = importance.masked_fill(~present, LOWEST)
    largest = torch.full_like(importance, LOWEST).scatter_reduce_(1, merge.assignment, importance, "amax")
    largest[:, :prefix] = -LOWEST
    return largest


def _prune(
    x: Tensor, importance: Tensor, count: Tensor, lengths: list[int], most: int, sizes: Tensor, prefix: int
) -> Grouping:
    """Keep the `count` most important tokens of every image in their order; the others, `most` in an image, are tied
    to one of them."""
    keep = ranks(importance) < count[:, None]
    is_token = importance > LOWEST
    assignment = (keep.cumsum(1) - 1).clamp_(min=0) * keep
    step = Grouping(assignment, count, lengths, sizes * keep, keep.float())
    assignment = tie_pruned(x, step.merge(x), assignment, is_token & ~keep, most, prefix, step.padding)
    return Grouping(assignment, count, lengths, sizes * keep, keep.float())


def ltmp_training(
    x: Tensor,
    keys: Tensor,
    *,
    importance: Tensor,
    mask: Tensor,
    merge_threshold: Tensor,
    prune_threshold: Tensor,
    temperature: float = 0.1,
    sizes: Tensor | None = None,
    prefix: int = 1,
) -> Masked:
    """The training form: nothing is removed, and gradients reach the thresholds through the mask (section 3.2).

    Args:
        x, keys, sizes, prefix: as for `ltmp`.
        importance: likewise; gradients reach it.
        mask: (B, L), 1 for the tokens that are there; gradients reach it.
        merge_threshold, prune_threshold: one number each, which gradients reach.
        temperature: of the soft decisions.

    Returns:
        The tokens in a new order: prefix tokens, then those at even and those at odd positions. At the next step
        they are split by their new positions, and so in another way than at inference: as in the published code.
    """
    n_images, length = extent(x)
    sizes = torch.ones_like(x[..., 0], dtype=torch.float32) if sizes is None else sizes.float()
    best, target = _best_even(keys, mask.detach(), prefix)
    merging = above(best, merge_threshold, temperature)
    moves = merging.detach() > 0.5
    largest = importance.scatter_reduce(1, target, importance * moves, "amax")
    stays = above(largest, prune_threshold, temperature)
    stays = torch.cat([torch.ones_like(stays[:, :prefix]), stays[:, prefix:]], 1)
    left = torch.where(mask.detach() > 0.5, 1 - merging, mask)
    after = torch.where(left.detach() > 0.5, stays, left)

    position = torch.arange(length, device=x.device)
    order = torch.cat([position[:prefix], *(part[part >= prefix] for part in (position[::2], position[1::2]))])
    place = torch.empty_like(order).scatter_(0, order, position)  # of the old tokens
    with torch.no_grad():
        group = torch.where(moves, target, position)
        sizes_after = sizes.scatter_add(1, target, sizes * moves)
        result = Grouping.of_length(group, length, sizes).merge(x)
        pruned = (left > 0.5) & (after < 0.5)
        most = int(pruned.sum(1).max())
        tied = tie_pruned(result, result, position.expand_as(group), pruned, most, prefix, after < 0.5)
        carried = place[tied.gather(1, group)]
    order = order.expand(n_images, -1)
    new_sizes, new_mask = sizes_after.gather(1, order), after.gather(1, order)
    return Masked(place[group], sizes, order, new_sizes, new_mask, carried)


@selection
def _best_even(keys: Tensor, mask: Tensor, prefix: int) -> tuple[Tensor, Tensor]:
    """For every token at an even position the most similar one at an odd position.

    Args:
        keys: (B, L, d).
        mask: (B, L), 0 for tokens that are gone, which are similar to none: their cosine is 0.

    Returns:
        similarity, (B, L), -inf for odd positions and prefix tokens; target, (B, L), a position, its own for those.
    """
    unit = F.normalize(precise(keys), dim=-1) * mask.unsqueeze(2)
    n_images, length = mask.shape
    similarity = torch.full_like(unit[..., 0], LOWEST)
    target = torch.arange(length, device=keys.device).repeat(n_images, 1)
    first_a, first_b = prefix + prefix % 2, prefix + 1 - prefix % 2  # patch tokens of either parity
    if first_b < length:
        even = slice(first_a, None, 2)
        similarity[:, even], partner = most_similar(unit[:, even], unit[:, first_b::2])
        target[:, even] = first_b + 2 * partner
    return similarity, target


def operations_left(masks: Sequence[Tensor], width: int, prefix: int = 1) -> Tensor:
    """Share of a network's operations that are left (section 3.3); differentiable.

    Args:
        masks: after the merge of each block, (B, N) each, patch tokens alone.
        width: D.
        prefix: number of prefix tokens, which count as tokens.
    """
    length = prefix + masks[0].shape[1]
    entering = [torch.as_tensor(float(length))] + [prefix + mask.sum(1).mean() for mask in masks]
    total: Any = 0
    for before, after in pairwise(entering):
        total = total + 2 * before * width**2 + before**2 * width + 4 * after * width**2
    return total / len(masks) / (6 * length * width**2 + length**2 * width)
