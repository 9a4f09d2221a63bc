"""Learned clusters, merged once, and a learned way back (ClustViT, arXiv 2510.01948)."""

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import Chain, Reduction
from g2tm.selection import precise, rows

IGNORED = 255
KEEP = 0  # the id of tokens that stay

Expand = Callable[[Tensor], Tensor]


class Clusters:
    """Reduction by cluster ids: tokens with id 0 stay, each other id becomes one token.

    The order is: kept tokens, padding, one representative per cluster. A cluster without tokens has a representative
    all the same, of zeros, which attends. An image that is skipped keeps all its tokens, and has no representatives.

    Args:
        x: (B, N, D), the tokens; they are needed for the way back.
        ids: (B, N), int64, 0 to `clusters`.
        clusters: k.
        expand: R, from (tokens, 2·D), a token before the merge and its representative as it came back, to (tokens, D).
        skipped: (B,), bool; None: those whose tokens all have one id.
        logits: (B, N, k + 1), what the ids were chosen by, for a loss.
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
        self.x, self.clusters, self.expand, self.logits = x, clusters, expand, logits
        self.skipped = (ids == ids[:, :1]).all(1) if skipped is None else skipped
        self.kept = (ids == KEEP) | self.skipped[:, None]
        n_kept, skips = torch.stack([self.kept.sum(1), self.skipped.long()]).tolist()  # the one wait for the device
        self.n_slots = max(n_kept, default=ids.shape[1])
        self._representatives = 0 if all(skips) else clusters
        self.lengths = tuple(kept + (0 if skip else clusters) for kept, skip in zip(n_kept, skips, strict=True))
        slots = self.kept.cumsum(1) - 1
        self.assignment = torch.where(self.kept, slots, self.n_slots + ids - 1)
        self.width = self.n_slots + self._representatives

    @cached_property
    def counts(self) -> Tensor:
        return self.kept.sum(1) + self.clusters * ~self.skipped

    @cached_property
    def padding(self) -> Tensor | None:
        """(B, M), bool: slots that hold no token, and representatives of skipped images; None: there are none."""
        if all(length == self.width for length in self.lengths):
            return None
        slots = torch.arange(self.n_slots, device=self.x.device) >= self.kept.sum(1, keepdim=True)
        return torch.cat([slots, self.skipped[:, None].expand(-1, self._representatives)], dim=1)

    @cached_property
    def sizes(self) -> Tensor:
        ones = torch.ones_like(self.assignment, dtype=torch.float32)
        return ones.new_zeros(len(ones), self.width).scatter_add_(1, self.assignment, ones)

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, M, D): kept tokens as they are, plain means of clusters (section 3.2)."""
        values = precise(x)
        groups = self.assignment.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        sums = values.new_zeros(len(x), self.width, x.shape[-1]).scatter_add(1, groups, values)
        return (sums / self.sizes.clamp(min=1).unsqueeze(-1).to(values.dtype)).to(x.dtype)

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """y: (B, M, D) -> (B, N, D): kept tokens get their own row back, merged ones what R makes of them."""
        own = rows(y, self.assignment)
        merged = ~self.kept
        pairs = torch.cat([self.x[merged], own[merged]], dim=-1)
        if not len(pairs):
            return own
        expanded = self.expand(pairs)
        return own.to(expanded.dtype).masked_scatter(merged.unsqueeze(-1), expanded)

    def then(self, second: Reduction) -> Chain:
        """This step followed by another."""
        return Chain(self, second)


def cluster_labels(labels: Tensor, patch_size: tuple[int, int], clusters: int) -> Tensor:
    """Pseudo-clusters of a label map: the labels that cover most patches alone (section 3.3).

    Args:
        labels: (B, H, W), integers, 255 is ignored; a side that is no multiple of the patch is filled up with 255.
        patch_size: pixels, (height, width).
        clusters: k.

    Returns:
        (B, gh, gw), int64: 1 to k in patches that show one of the k labels with most patches of one label, in the
        order of their number, of equal numbers the smaller label first; 0 elsewhere.
    """
    missing = [-side % patch for side, patch in zip(labels.shape[1:], patch_size, strict=True)]
    labels = F.pad(labels.long(), (0, missing[1], 0, missing[0]), value=IGNORED)
    height, width = patch_size
    patches = labels.unfold(1, height, height).unfold(2, width, width).flatten(3)
    first = patches[..., 0]
    pure = (patches == first.unsqueeze(-1)).all(-1) & (first != IGNORED)
    counts = torch.zeros(len(labels), IGNORED + 1, dtype=torch.long, device=labels.device)
    counts.scatter_add_(1, first.flatten(1), pure.flatten(1).long())
    order = counts.argsort(dim=1, descending=True, stable=True)[:, :clusters]
    ids = torch.zeros_like(counts)
    ranks = torch.arange(1, clusters + 1, device=labels.device).expand_as(order)
    ids.scatter_(1, order, torch.where(counts.gather(1, order) > 0, ranks, 0))
    return torch.where(pure, ids.gather(1, first.flatten(1)).view_as(first), 0)


def clustering_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean cross-entropy over all patches (section 3.3).

    Args:
        logits: (B, N, k + 1).
        ids: (B, gh, gw), from `cluster_labels`.
    """
    return F.cross_entropy(logits.float().flatten(0, 1), ids.flatten())
