"""DiffRate (ICCV 2023): sort by importance, prune the tail, merge the next part; both rates can be learned.

Counts are those of patch tokens: the published ones, which count CLS, are larger by one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from g2tm.attention import SMALLEST_SIZE
from g2tm.masked import MaskedTokens, straight_through
from g2tm.reduction import Grouping, one_by_one
from g2tm.selection import batch_and_length, falling, inverse, or_ones, own_positions, rows, selection
from g2tm.similarity import most_similar, tie_pruned, unit_vectors


@one_by_one
@selection
def diffrate(
    x: Tensor, *, importance: Tensor, kept: int, merged: int, sizes: Tensor | None = None, padding: Tensor | None = None
) -> Grouping:
    """Keep the most important tokens, and merge the last of these into those in front of them (section 3.2).

    Tokens come by falling importance. Means are plain ones, in which pruned tokens do not count. The size of a token
    that merged is discounted by its similarity.

    Args:
        x, sizes, padding: see `g2tm`; x is the residual stream, compared by cosine.
        importance: (B, N), attention of CLS to every token, mean over the heads.
        kept, merged: tokens, 1 or more, that pruning leaves, and that merging leaves of these; no more than there are.
    """
    if min(kept, merged) < 1:
        raise ValueError(f"{kept} patch tokens kept and {merged} after merging: keep at least one")
    n_images, n_tokens = batch_and_length(x)
    kept, merged = min(kept, n_tokens), min(kept, merged, n_tokens)
    sizes = or_ones(sizes, x[..., 0])
    if n_images == 0 or n_tokens == 0:
        return Grouping.identity(x, sizes)
    order = falling(importance)
    sources = order[:, merged:kept]
    similarity, targets = sources_to_targets(x, order, kept, merged)
    pruned = torch.zeros_like(order, dtype=torch.bool)
    if kept < n_tokens:  # ONNX cannot scatter nothing
        pruned.scatter_(1, order[:, kept:], 1)
    sizes = sizes.masked_fill(pruned, 0.0)
    sizes = sizes.scatter(1, sources, similarity.to(sizes.dtype) * sizes.gather(1, sources))
    target = own_positions(x).scatter(1, sources, order.gather(1, targets))
    target = torch.where(pruned, order[:, :1], target)  # until they are tied
    step = Grouping.of_targets(target, order[:, :merged], _floored(sizes, target), (~pruned).float())
    if kept == n_tokens:
        return step
    assignment = tie_pruned(x, step.merge(x), step.assignment, pruned, n_tokens - kept)
    return Grouping(assignment, step.counts, step.lengths, step.old_sizes, (~pruned).float())


def sources_to_targets(x: Tensor, order: Tensor, kept: int, merged: int) -> tuple[Tensor, Tensor]:
    """Find, of the sorted tokens, the best target of every source, which has one of the places `merged` to `kept`.

    Both similarity (cosine) and targets (places below `merged`) are (B, kept - merged).
    """
    unit = unit_vectors(rows(x, order[:, :kept]))
    if kept == merged:
        return unit.new_zeros(len(unit), 0), order[:, :0]
    return most_similar(unit[:, merged:], unit[:, :merged])


def _floored(sizes: Tensor, target: Tensor) -> Tensor:
    """Sizes whose sums over the groups are positive, though sources of negative similarity count less than nothing."""
    sums = torch.zeros_like(sizes).scatter_add_(1, target, sizes)
    is_target = torch.zeros_like(sizes).scatter_(1, target, 1.0)
    return sizes + is_target * (SMALLEST_SIZE - sums).clamp(min=0)


def kept_tokens(logits: Tensor, candidates: Tensor) -> Tensor:
    """Number of patch tokens that a learned rate keeps, a whole scalar with the gradient of the expected number
    (section 3.3).

    logits, candidates: (K,) each, of numbers of patch tokens.
    """
    expected = (candidates * logits.softmax(0)).sum()
    return straight_through(expected.ceil(), expected)


def rate_mask(logits: Tensor, candidates: Tensor, kept: int, alive: int, length: int) -> Tensor:
    """Mask over the sorted tokens, (length,): 0 from `kept` up to `alive`, else 1.

    Its gradient is that of the probability that a position stays, the sum over all candidates, (K,), that keep it.
    """
    position = torch.arange(length, device=logits.device)
    stays = ((candidates > position[:, None]) * logits.softmax(0)).sum(1)
    hard = (position < kept) | (position >= alive)
    return straight_through(hard.to(stays.dtype), stays)


def diffrate_training(
    x: Tensor,
    *,
    importance: Tensor,
    prune: tuple[Tensor, Tensor],
    merge: tuple[Tensor, Tensor],
    mask: Tensor | None = None,
    sizes: Tensor | None = None,
) -> MaskedTokens:
    """The training form: nothing is removed, and gradients reach the rates through the mask (section 3.4).

    Tokens come in sorted order, those that are alive first.

    Args:
        x, importance, sizes: as for `diffrate`.
        prune, merge: logits and candidates of both rates, (K,) each.
        mask: (B, N), 1 for the tokens that are alive, the same number in every image; None: all are.
    """
    n_images, n_tokens = batch_and_length(x)
    ones = torch.ones_like(x[..., 0], dtype=torch.float32)
    alive = n_tokens if mask is None else int(mask[:1].detach().sum())
    mask, sizes = ones if mask is None else mask, or_ones(sizes, ones)
    order = falling(importance)
    kept, merged = (int(kept_tokens(*rate)) for rate in (prune, merge))
    mask, sizes = mask.gather(1, order), sizes.gather(1, order)
    if kept < alive:
        mask = mask * rate_mask(*prune, kept, alive, n_tokens)
    kept = min(kept, alive)
    if merged < kept:
        mask = mask * rate_mask(*merge, merged, kept, n_tokens)
    merged = min(merged, kept)
    position = torch.arange(n_tokens, device=x.device).expand_as(order)
    with torch.no_grad():
        group = position.clone()  # in sorted order
        if merged < kept:
            similarity, targets = sources_to_targets(x, order, kept, merged)
            group[:, merged:kept] = targets
            sizes = sizes.clone()
            sizes[:, merged:kept] *= similarity
            sizes[:, :kept] = sizes[:, :kept].clamp(min=1)
            sizes[:, :merged] = sizes.new_zeros(n_images, merged).scatter_add(1, group[:, :kept], sizes[:, :kept])
        place = inverse(order)
        carried = _carried(rows(x, order), group, kept, merged, alive)
    return MaskedTokens(group.gather(1, place), ones, order, sizes, mask, carried.gather(1, place))


def _carried(x: Tensor, group: Tensor, kept: int, merged: int, alive: int) -> Tensor:
    """(B, N), of the sorted tokens x, (B, N, D): the position that carries each; pruned ones are tied."""
    if kept >= alive:
        return group
    position = torch.arange(x.shape[1], device=x.device)
    result = Grouping.of_length(group, x.shape[1]).merge(x)
    pruned = ((position >= kept) & (position < alive)).expand_as(group)
    return tie_pruned(x, result, group, pruned, alive - kept, (position >= merged).expand_as(group))


def gigaflops(
    prune: Sequence[Tensor | float],
    merge: Sequence[Tensor | float],
    *,
    length: int,
    width: int,
    patch_size: int = 16,
    classes: int = 0,
) -> Tensor:
    """10⁹ operations of an encoder whose blocks keep so many tokens (section 3.4); differentiable.

    The gradient of a block's number of tokens reaches both of its rates, whichever is smaller, and not the blocks
    before.

    Args:
        prune, merge: tokens of the whole sequence that each block keeps after pruning and after merging.
        length, width: tokens of the whole sequence at first, and D.
        patch_size, classes: side of a patch in pixels, and outputs of a classification head.
    """
    tokens: Any = float(length)
    total = tokens * width * 3 * patch_size**2 + width * classes
    for kept, merged in zip(prune, merge, strict=True):
        total = total + 4 * tokens * width**2 + 2 * tokens**2 * width
        left = min(float(torch.as_tensor(count).detach()) for count in (tokens, kept, merged))
        tokens = left + sum(count - count.detach() for count in (kept, merged) if isinstance(count, Tensor))
        total = total + 8 * tokens * width**2
    return torch.as_tensor(total) / 1e9
