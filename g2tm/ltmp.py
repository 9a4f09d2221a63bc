"""Learned thresholds (LTMP, TMLR 2023): merge what is similar enough, then prune what is not important enough."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from g2tm.masked import MaskedTokens, above
from g2tm.matching import assign, best_partners, count_above, sides
from g2tm.reduction import Grouping, Reduction
from g2tm.selection import batch_and_length, or_ones, own_positions, ranks, same_for_all, selection, tokens_in
from g2tm.similarity import LOWEST, most_similar, tie_pruned, unit_vectors
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
    padding: Tensor | None = None,
    odd_first: bool = True,
    batch: str = "ragged",
) -> Reduction:
    """Merge as in `bipartite` every pair above one threshold, then prune every token up to another (section 3).

    A merged token is as important as the most important one in it. The order is that of `bipartite`.

    Args:
        x, keys, sizes, padding, odd_first: see `g2tm`; x is the residual stream.
        importance: (B, N), attention that each token gets, mean over heads and queries.
        merge_threshold: cosine similarity above which a pair merges, from 0 to 1, or a tensor of one number; 1: none
            does.
        prune_threshold: importance above which a token stays, likewise; 0: all do.
        tokens: keep exactly so many tokens, in images without padding. Pairs above the threshold merge, the most
            similar first, as long as there are more; then the least important tokens are pruned, whatever their
            importance. A number that the image has not: all stay.
        fewest: tokens that every image keeps, the most important ones; 0 in the published code, which may leave an
            image without any.
        batch: see `g2tm`; "uniform": every image then keeps as many tokens as the image that keeps most.
    """
    for name, threshold in (("merge_threshold", merge_threshold), ("prune_threshold", prune_threshold)):
        if not isinstance(threshold, Tensor):  # which would have to be waited for
            check_share(threshold, name)
    check_batch(batch)
    n_images, n_tokens = batch_and_length(x)
    if tokens is not None:
        check_tokens(tokens, 1, max(n_tokens, tokens), padding)
        tokens = min(tokens, n_tokens)
    if n_images == 0 or n_tokens == 0:
        return Grouping.identity(x, sizes)
    importance = importance.float()
    if padding is not None:
        importance = importance.masked_fill(padding, LOWEST)
        sizes = (~padding).float() if sizes is None else sizes.masked_fill(padding, 0)
    merge = _merge(keys, merge_threshold, tokens, sizes, padding, odd_first, batch)
    largest = torch.full_like(importance, LOWEST)  # in every group; padding keeps it
    importance = largest.scatter_reduce_(1, merge.assignment, importance, "amax")
    count = (importance > prune_threshold).sum(1) if tokens is None else torch.full_like(merge.counts, tokens)
    count = torch.minimum(count.clamp(min=fewest), merge.counts)
    if batch == "uniform":
        count = torch.minimum(count.max(), merge.counts)
    if tokens is None:
        lengths, pruned = torch.stack([count, merge.counts - count]).tolist()
    else:
        lengths, pruned = same_for_all(tokens, n_images), [n_tokens - tokens]
    return merge.then(_prune(merge.merge(x), importance, count, lengths, max(pruned), merge.sizes))


def _merge(
    keys: Tensor,
    threshold: float | Tensor,
    tokens: int | None,
    sizes: Tensor | None,
    padding: Tensor | None,
    odd_first: bool,
    batch: str,
) -> Grouping:
    """The first half. Its groups have padding up to N, so that there is nothing to wait for yet."""
    n_images, n_tokens = batch_and_length(keys)
    lengths = tokens_in(keys, padding)
    if n_tokens < 2:  # nothing to merge into
        assignment, n_merges = torch.zeros_like(keys[..., 0], dtype=torch.int64), lengths * 0
    else:
        similarity, partner = best_partners(keys, odd_first, padding)
        n_merges = count_above(similarity, threshold, None, batch)
        if tokens is not None:
            n_merges = torch.minimum(n_merges, lengths - tokens)
        assignment = assign(similarity, partner, n_merges, lengths, odd_first, n_tokens)
    if padding is not None:
        assignment = assignment.masked_fill(padding, 0)
    return Grouping(assignment, lengths - n_merges, same_for_all(n_tokens, n_images), sizes, width=n_tokens)


def _prune(x: Tensor, importance: Tensor, count: Tensor, lengths: list[int], most: int, sizes: Tensor) -> Grouping:
    """Keep the `count` most important tokens of every image in their order; the others, `most` in an image, are tied
    to one of them. Where no image keeps any, one slot of padding is left."""
    keep = ranks(importance) < count[:, None]
    assignment = (keep.cumsum(1) - 1).clamp_(min=0) * keep
    sizes, weights, width = sizes * keep, keep.float(), None if max(lengths) > 0 else 1
    step = Grouping(assignment, count, lengths, sizes, weights, width)
    pruned = (importance > LOWEST) & ~keep
    assignment = tie_pruned(x, step.merge(x), assignment, pruned, most, step.padding)
    return Grouping(assignment, count, lengths, sizes, weights, width)


def ltmp_training(
    x: Tensor,
    keys: Tensor,
    *,
    importance: Tensor,
    merge_threshold: float | Tensor,
    prune_threshold: float | Tensor,
    mask: Tensor | None = None,
    temperature: float = 0.1,
    sizes: Tensor | None = None,
    odd_first: bool = True,
) -> MaskedTokens:
    """The training form: nothing is removed, and gradients reach the thresholds through the mask (section 3.2).

    Tokens come in a new order: those at even and then those at odd positions. At the next step they are split by
    their new positions, and so in another way than at inference: as in the published code.

    Args:
        x, keys, sizes, odd_first: as for `ltmp`.
        importance: likewise; gradients reach it.
        merge_threshold, prune_threshold: one number each, which gradients reach.
        mask: (B, N), 1 for the tokens that are there; gradients reach it. None: all are.
        temperature: of the soft decisions.
    """
    n_images, n_tokens = batch_and_length(x)
    sizes = or_ones(sizes, x[..., 0])
    mask = torch.ones_like(sizes) if mask is None else mask
    best, target = _best_even(keys, mask.detach(), odd_first)
    merging = above(best, merge_threshold, temperature)
    moves = merging.detach() > 0.5
    largest = importance.scatter_reduce(1, target, importance * moves, "amax")
    stays = above(largest, prune_threshold, temperature)
    left = torch.where(mask.detach() > 0.5, 1 - merging, mask)
    after = torch.where(left.detach() > 0.5, stays, left)

    position = torch.arange(n_tokens, device=x.device)
    order = torch.cat([position[side] for side in sides(odd_first)])
    place = torch.empty_like(order).scatter_(0, order, position)  # of the old tokens
    with torch.no_grad():
        group = torch.where(moves, target, position)
        sizes_after = sizes.scatter_add(1, target, sizes * moves)
        result = Grouping.of_length(group, n_tokens, sizes).merge(x)
        pruned = (left > 0.5) & (after < 0.5)
        most = int(pruned.sum(1).max()) if n_images else 0
        tied = tie_pruned(result, result, position.expand_as(group), pruned, most, after < 0.5)
        carried = place[tied.gather(1, group)]
    order = order.expand(n_images, -1)
    new_sizes, new_mask = sizes_after.gather(1, order), after.gather(1, order)
    return MaskedTokens(place[group], sizes, order, new_sizes, new_mask, carried)


@selection
def _best_even(keys: Tensor, mask: Tensor, odd_first: bool) -> tuple[Tensor, Tensor]:
    """Find for every token at an even position the most similar one at an odd position.

    mask: (B, N), 0 for tokens that are gone, which are similar to none: their cosine is 0. Returns similarity, (B, N),
    -inf for odd positions; target, (B, N), a position, its own for those.
    """
    unit = unit_vectors(keys) * mask.unsqueeze(2)
    similarity = torch.full_like(unit[..., 0], LOWEST)
    target = own_positions(keys)
    even, odd = sides(odd_first)
    if odd.start < mask.shape[1]:
        similarity[:, even], partner = most_similar(unit[:, even], unit[:, odd])
        target[:, even] = odd.start + 2 * partner
    return similarity, target


def operations_left(lengths: Sequence[Tensor | float], width: int) -> Tensor:
    """Share of a network's operations that are left (section 3.3); differentiable.

    lengths: of the whole sequence, at first, and after the merge of each block; means over the images. width: D.
    """
    length, total = lengths[0], torch.zeros(())
    for before, after in pairwise(lengths):
        total = total + 2 * before * width**2 + before**2 * width + 4 * after * width**2
    return total / (len(lengths) - 1) / (6 * length * width**2 + length**2 * width)
