"""Learned clusters, merged once, and a learned way back (ClustViT, arXiv 2510.01948)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import Grouping
from g2tm.selection import falling

IGNORED = 255
KEEP = 0  # the id of tokens that stay

Expand = Callable[[Tensor], Tensor]


class Clusters(Grouping):
    """Reduction by cluster ids: tokens with id 0 stay, each other id becomes one token, the plain mean (section 3.2).

    The order is: kept tokens, padding, one representative per cluster. A cluster without tokens has a representative
    all the same, of zeros and of size 0, which attends. An image that is skipped keeps all its tokens; its
    representatives are padding.

    Args:
        x: (B, N, D), the tokens, for the way back.
        ids: (B, N), int64, 0 to `clusters`.
        clusters: k.
        expand: R, from (tokens, 2·D), a token before the merge and its representative as it came back, to (tokens, D).
        skipped: (B,), bool; None: those whose tokens all have one id.
        logits: (B, N, k + 1), by which the ids were chosen, for a loss.
    """

    def __init__(
        self,
        x: Tensor,
        ids: Tensor,
        clusters: int,
        expand: Expand,
        skipped: Tensor | None = None,
        logits: Tensor | None = None,
    ) -> None:
        self.x, self.expand, self.logits = x, expand, logits
        skipped = (ids == ids[:, :1]).all(1) if skipped is None else skipped
        self.kept = (ids == KEEP) | skipped[:, None]
        n_kept = self.kept.sum(1)
        numbers, skips = torch.stack([n_kept, skipped.long()]).tolist()  # the one wait for the device
        slots = max(numbers, default=ids.shape[1])
        representatives = 0 if all(skips) else clusters
        lengths = [kept + (0 if skip else clusters) for kept, skip in zip(numbers, skips, strict=True)]
        width, padding = slots + representatives, None
        if any(length < width for length in lengths):
            padding = torch.arange(slots, device=ids.device) >= n_kept[:, None]
            padding = torch.cat([padding, skipped[:, None].expand(-1, representatives)], dim=1)
        assignment = torch.where(self.kept, self.kept.cumsum(1) - 1, slots + ids - 1)
        given = None if padding is None else width, padding
        super().__init__(assignment, n_kept + clusters * ~skipped, lengths, None, None, *given)
        self.n_merged = self.kept.numel() - sum(numbers)

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """y: (B, M, D) -> (B, N, D): kept tokens get their own row back, merged ones the output of R."""
        own = super().unmerge(y)
        if self.n_merged == 0:
            return own
        merged = ~self.kept.flatten()
        position = torch.arange(len(merged), device=y.device)
        where = torch.where(merged, merged.cumsum(0) - 1, self.n_merged)  # not by `nonzero`, which waits for the device
        places = position.new_empty(self.n_merged + 1).scatter_(0, where, position)[:-1]
        expanded = self.expand(torch.cat([tokens.flatten(0, 1)[places] for tokens in (self.x, own)], dim=-1))
        return own.to(expanded.dtype).flatten(0, 1).index_copy(0, places, expanded).view_as(own)


def cluster_labels(labels: Tensor, patch_size: tuple[int, int], clusters: int) -> Tensor:
    """Pseudo-clusters of a label map: the k labels that cover most patches alone (section 3.3).

    Args:
        labels: (B, H, W), integers, 255 is ignored; a side that is no multiple of the patch is filled up with 255.
        patch_size, clusters: pixels, (height, width), and k.

    Returns:
        (B, gh, gw), int64: 1 to k in patches that show one of these labels alone, that with most patches first, of
        equal numbers the smaller label; 0 elsewhere.
    """
    missing = [-side % patch for side, patch in zip(labels.shape[1:], patch_size, strict=True)]
    labels = F.pad(labels.long(), (0, missing[1], 0, missing[0]), value=IGNORED)
    height, width = patch_size
    patches = labels.unfold(1, height, height).unfold(2, width, width).flatten(3)
    first = patches[..., 0]
    pure = (patches == first.unsqueeze(-1)).all(-1) & (first != IGNORED)
    counts = torch.zeros(len(labels), IGNORED + 1, dtype=torch.long, device=labels.device)
    counts.scatter_add_(1, first.flatten(1), pure.flatten(1).long())
    order = falling(counts)[:, :clusters]
    ids = torch.zeros_like(counts)
    ranks = torch.arange(1, clusters + 1, device=labels.device).expand_as(order)
    ids.scatter_(1, order, torch.where(counts.gather(1, order) > 0, ranks, 0))
    return torch.where(pure, ids.gather(1, first.flatten(1)).view_as(first), 0)


def clustering_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy of logits, (B, N, k + 1), with `cluster_labels`, (B, gh, gw) (section 3.3)."""
    return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
