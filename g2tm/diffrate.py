"""DiffRate (ICCV 2023): sort by importance, prune the tail, merge the next part; both rates can be learned."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.attention import SMALLEST_SIZE
from g2tm.masked import Masked, straight_through
from g2tm.pruning import tie_pruned
from g2tm.reduction import Grouping
from g2tm.selection import LOWEST, extent, most_similar, precise, rows, selection


@selection
def diffrate(
    x: Tensor,
    *,
    importance: Tensor,
    kept: int,
    merged: int,
    sizes: Tensor | None = None,
    prefix: int = 1,
) -> Grouping:
    """Keep the most important tokens, and merge the last of these into those in front of them (section 3.2).

    Args:
        x: (B, L, D), the residual stream, compared by cosine; prefix tokens first.
        importance: (B, L), attention of CLS to every token, mean over the heads.
        kept: tokens that pruning leaves, prefix tokens included.
        merged: tokens that merging leaves of these, prefix tokens included.
        sizes: (B, L), what each token counts already; None: 1 each.
        prefix: number of prefix tokens, which neither leave nor are merged into.

    Returns:
        A `Grouping` of the whole sequence: prefix tokens, then patch tokens by falling importance. Its means are plain
        ones, in which pruned tokens do not count. The size of a token that merged is discounted by its similarity.

    Raises:
        ValueError: a merge without a patch token to merge into.
    """
    n_images, length = extent(x)
    kept = min(kept, length)
    merged = check_counts(kept, merged, prefix)
    sizes = torch.ones_like(x[..., 0], dtype=torch.float32) if sizes is None else sizes.float()
    if n_images == 0:
        return Grouping.identity(x, sizes)
    order = by_importance(importance, prefix)
    sources, places = order[:, merged:kept], torch.arange(length, device=x.device)
    similarity, targets = sources_to_targets(x, order, kept, merged, prefix)
    pruned = torch.zeros_like(order, dtype=torch.bool)
    if kept < length:  # ONNX cannot scatter nothing
        pruned.scatter_(1, order[:, kept:], 1)
    sizes = sizes.masked_fill(pruned, 0.0)
    sizes = sizes.scatter(1, sources, similarity.to(sizes.dtype) * sizes.gather(1, sources))
    target = places.repeat(n_images, 1).scatter_(1, sources, order.gather(1, targets))
    target = torch.where(pruned, order[:, :1], target)  # until they are tied
    step = Grouping.of_targets(target, order[:, :merged], _floored(sizes, target), (~pruned).float())
    if kept == length:
        return step
    assignment = tie_pruned(x, step.merge(x), step.assignment, pruned, length - kept, prefix, None)
    return Grouping(assignment, step.counts, step.lengths, step.old_sizes, (~pruned).float())


def check_counts(kept: int, merged: int, prefix: int) -> int:
    """Tokens that are left; raises a ValueError where none could be merged into, or where nothing would be kept."""
    if kept < max(prefix, 1) or merged < 1 or (merged <= prefix and merged < kept):
        raise ValueError(
            f"{kept} tokens kept and {merged} after merging: keep the {prefix} prefix tokens and at least one patch"
        )
    return min(kept, merged)


def by_importance(importance: Tensor, prefix: int) -> Tensor:
    """(B, L) -> positions, (B, L): prefix tokens, then the others by falling importance, of equal ones the first."""
    importance = importance.clone()
    importance[:, :prefix] = -LOWEST
    return importance.argsort(dim=1, descending=True, stable=True)


def sources_to_targets(x: Tensor, order: Tensor, kept: int, merged: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Of the sorted tokens, the best target of every source, places `merged` to `kept`.

    Returns:
        similarity, (B, kept - merged), cosine; targets, likewise, places below `merged`, and no prefix token.
    """
    unit = F.normalize(precise(rows(x, order[:, :kept])), dim=-1)

    def no_prefix(product: Tensor, _: int) -> None:
        product[:, :, :prefix] = LOWEST

    if kept == merged:
        return unit.new_zeros(len(unit), 0), order[:, :0]
    return most_similar(unit[:, merged:], unit[:, :merged], no_prefix)


def _floored(sizes: Tensor, target: Tensor) -> Tensor:
    """Sizes whose sums over the groups are positive, though sources of negative similarity count less than nothing."""
    sums = torch.zeros_like(sizes).scatter_add_(1, target, sizes)
    is_target = torch.zeros_like(sizes).scatter_(1, target, 1.0)
    return sizes + is_target * (SMALLEST_SIZE - sums).clamp(min=0)


def kept_tokens(logits: Tensor, candidates: Tensor, prefix: int) -> Tensor:
    """Number of tokens that a learned rate keeps, prefix tokens included (section 3.3).

    Args:
        logits: (K,), of the candidates.
        candidates: (K,), numbers of patch tokens.

    Returns:
        Scalar, whole; its gradient is that of the expected number.
    """
    expected = (candidates * logits.softmax(0)).sum()
    return prefix + straight_through(expected.ceil(), expected)


def rate_mask(logits: Tensor, candidates: Tensor, kept: int, alive: int, length: int, prefix: int) -> Tensor:
    """Mask over the sorted tokens: 0 from `kept` up to `alive`, else 1.

    Its gradient is that of the probability that a position stays, the sum over all candidates that keep it.

    Args:
        logits, candidates: (K,) each.
        kept, alive, length: numbers of tokens, prefix tokens included.

    Returns:
        (L,).
    """
    position = torch.arange(length, device=logits.device)
    stays = ((candidates + prefix > position[:, None]) * logits.softmax(0)).sum(1)
    hard = (position < kept) | (position >= alive)
    return straight_through(hard.to(stays.dtype), stays)


def diffrate_training(
    x: Tensor,
    *,
    importance: Tensor,
    mask: Tensor,
    prune: tuple[Tensor, Tensor],
    merge: tuple[Tensor, Tensor],
    sizes: Tensor | None = None,
    prefix: int = 1,
) -> Masked:
    """The training form: nothing is removed, and gradients reach the rates through the mask (section 3.4).

    Args:
        x, importance, sizes, prefix: as for `diffrate`.
        mask: (B, L), 1 for the tokens that are alive, the same number in every image.
        prune, merge: logits and candidates of both rates, (K,) each.

    Returns:
        The tokens in sorted order: those that are alive first.
    """
    n_images, length = extent(x)
    sizes = torch.ones_like(x[..., 0], dtype=torch.float32) if sizes is None else sizes.float()
    order = by_importance(importance, prefix)
    alive = int(mask[0].detach().sum())
    kept, merged = (int(kept_tokens(*rate, prefix)) for rate in (prune, merge))
    mask, sizes = mask.gather(1, order), sizes.gather(1, order)
    if kept < alive:
        mask = mask * rate_mask(*prune, kept, alive, length, prefix)
    kept = min(kept, alive)
    if merged < kept:
        mask = mask * rate_mask(*merge, merged, kept, length, prefix)
    merged = min(merged, kept)
    with torch.no_grad():
        group = torch.arange(length, device=x.device).repeat(n_images, 1)  # in sorted order
        if merged < kept:
            similarity, targets = sources_to_targets(x, order, kept, merged, prefix)
            group[:, merged:kept] = targets
            sizes = sizes.clone()
            sizes[:, merged:kept] *= similarity
            sizes[:, :kept] = sizes[:, :kept].clamp(min=1)
            sizes[:, :merged] = sizes.new_zeros(n_images, merged).scatter_add(1, group[:, :kept], sizes[:, :kept])
        place = torch.empty_like(order).scatter_(1, order, torch.arange(length, device=x.device).expand_as(order))
        carried = _carried(rows(x, order), group, kept, merged, alive, prefix)
    weights = torch.ones_like(sizes)
    return Masked(group.gather(1, place), weights, order, sizes, mask, carried.gather(1, place))


def _carried(x: Tensor, group: Tensor, kept: int, merged: int, alive: int, prefix: int) -> Tensor:
    """(B, L), of the sorted tokens x, (B, L, D): the position that carries each; pruned ones are tied."""
    if kept >= alive:
        return group
    position = torch.arange(x.shape[1], device=x.device)
    result = Grouping.of_length(group, x.shape[1]).merge(x)
    pruned = ((position >= kept) & (position < alive)).expand_as(group)
    gone = (position >= merged).expand_as(group)
    return tie_pruned(x, result, group, pruned, alive - kept, prefix, gone)


def gigaflops(
    prune: Sequence[Tensor | float],
    merge: Sequence[Tensor | float],
    *,
    patches: int,
    width: int,
    patch_size: int = 16,
    classes: int = 0,
    prefix: int = 1,
) -> Tensor:
    """10⁹ operations of an encoder whose blocks keep so many tokens (section 3.4); differentiable.

    The gradient of a block's number of tokens reaches both of its rates, whichever is smaller, and not the blocks
    before.

    Args:
        prune, merge: tokens that each block keeps after pruning and after merging, prefix tokens included.
        patches: of an image.
        width: D.
        patch_size: side of a patch in pixels.
        classes: of a classification head.
        prefix: number of prefix tokens.
    """
    tokens: Any = float(patches + prefix)
    total = tokens * width * 3 * patch_size**2 + width * classes
    for kept, merged in zip(prune, merge, strict=True):
        total = total + 4 * tokens * width**2 + 2 * tokens**2 * width
        left = min(float(torch.as_tensor(count).detach()) for count in (tokens, kept, merged))
        tokens = left + sum(count - count.detach() for count in (kept, merged) if isinstance(count, Tensor))
        total = total + 8 * tokens * width**2
    return torch.as_tensor(total) / 1e9
