"""Token merging with a decoupled embedding (DTEM, NeurIPS 2024): ToMe on a learned metric, soft while it trains.

Inference is `bipartite` on what `embed` gives. The published code divides the metric by a norm of at least 1e-6,
`bipartite` by one of at least 1e-12. They agree on zero, and elsewhere down to norms of 1e-6, which the affine map of
a normalized token does not fall below.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import Reduction, equal_counts
from g2tm.selection import at_least_float32, falling, rows, without_autocast
from g2tm.similarity import exact_product
from g2tm.validation import check_r

NORM_FLOOR = 1e-6  # smallest norm that a metric is divided by
REMAINDER_FLOOR = torch.finfo(torch.float32).eps  # smallest share of a token that counts as still unmerged


def embed(h: Tensor, weight: Tensor, bias: Tensor | None, share: float = 0.1) -> Tensor:
    """Learned metric E·h + b, which lets only a share of its gradient into the features.

    Args:
        h: (B, N, D), the normalized input of the block, which the attention projects.
        weight, bias: (E, D) and (E,); the result is (B, N, E).
        share: of the gradient that reaches h; 0.1 in the published code, 0 in the paper. Weight and bias get all.
    """
    return F.linear(torch.lerp(h.detach(), h, share) if h.requires_grad else h, weight, bias)


@torch.no_grad()
def split(sizes: Tensor, n_live: int, random: bool, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Choose the tokens of a training step that may merge, A, and those that they may merge into, B.

    The largest tokens take part, of equal ones the first: as many as a hard reduction would have left. So tokens that
    have merged before fade out, though none is removed.

    Args:
        sizes, n_live: (B, N), and the number of tokens that take part, P; more than N count as N.
        random: False: the P tokens alternate in their order, the first is in A (the paper). True: a random half of
            them is A in each image (the published code).
        generator: on the device of the sizes, for `random`.

    Returns:
        a_index: (B, P // 2); b_index: (B, P - P // 2); int64, positions, ascending.
    """
    order = falling(sizes)
    live = order[:, : max(n_live, 0)].sort(dim=1).values
    n_images, n_live = live.shape
    half = n_live // 2
    if random:
        chosen = torch.rand(n_images, n_live, generator=generator, device=sizes.device).argsort(dim=1)
        a, b = (part.sort(dim=1).values for part in (chosen[:, :half], chosen[:, half:]))
        return live.gather(1, a), live.gather(1, b)
    return live[:, : 2 * half : 2], torch.cat([live[:, 1 : 2 * half : 2], live[:, 2 * half :]], 1)


def soft_merge(
    metric: Tensor, *, r: int, inverse_temperature: float, a_index: Tensor, b_index: Tensor, sizes: Tensor | None = None
) -> "SoftMerge":
    """Merge about r tokens of A into those of B, softly, all N in their order (training).

    Args:
        metric: (B, N, E), see `embed`; gradients reach it through what the reduction merges and through its sizes.
        r: number of merges; more than A has count as all of A.
        inverse_temperature: 30 in the published code, 10 in the paper.
        a_index, b_index: (B, A) and (B, K), positions of the two sets, see `split`.
        sizes: see `g2tm`. Gradients reach them too.
    """
    check_r(r)
    with without_autocast(metric):
        metric = at_least_float32(metric)
        sizes = metric.new_ones(metric.shape[:2]) if sizes is None else sizes.to(metric.dtype)
        unit = F.normalize(metric, dim=-1, eps=NORM_FLOOR)
        similarity = exact_product(rows(unit, a_index), rows(unit, b_index).mT)
        within, amount = soft_top_r(similarity, min(r, a_index.shape[1]), inverse_temperature)
        return SoftMerge(within, amount, a_index, b_index, sizes)


def soft_top_r(similarity: Tensor, r: int, inverse_temperature: float) -> tuple[Tensor, Tensor]:
    """Soft choice of the r best pairs, no token of A in more than one.

    Each round takes the softmax q over all pairs, then adds ln(1 - Σ_j q_ij) to the similarities of row i, before
    they are divided by the temperature: a token that is chosen is switched off. What is added is the same for the
    whole row, so the softmax *within* a row is the same in every round. It is computed once, and the rounds choose
    among rows. That is the published loop exactly, but gradients need one matrix of pairs and not one per round.

    similarity: (B, A, K), K > 0 unless A = 0; r: number of rounds.

    Returns:
        within: (B, A, K), the shares in which a token of A gives to those of B; a row sums to 1.
        amount: (B, A), how much of itself it gives, from 0 to 1.
    """
    logits = inverse_temperature * similarity
    within = logits.softmax(dim=2)
    amount = similarity.new_zeros(similarity.shape[:2])
    if r == 0:
        return within, amount
    best, place = logits.max(dim=2, keepdim=True)
    row_logits = (best - within.gather(2, place).log()).squeeze(2)  # logsumexp, which would store the pairs again
    for _ in range(r):
        chosen = row_logits.softmax(dim=1)
        amount = amount + chosen
        row_logits = row_logits + inverse_temperature * (1 - chosen).clamp(min=REMAINDER_FLOOR).log()
    return within, amount / amount.detach().clamp(min=1)


class SoftMerge(Reduction):
    """Tokens of A give, tokens of B receive, and all of them stay: the training form of a merge.

    A token of B becomes the mean of itself and of what it receives, weighted by size, and counts for all of it. A
    token of A keeps its value and counts for what it has not given: so it fades out of the next attention.

    within, amount: see `soft_top_r`; a_index, b_index: see `soft_merge`; sizes: (B, N), of the tokens before. Those
    afterwards, from 0 up, carry gradients.
    """

    def __init__(self, within: Tensor, amount: Tensor, a_index: Tensor, b_index: Tensor, sizes: Tensor) -> None:
        self.counts, self.lengths = equal_counts(sizes, int(sizes.shape[1]))
        self._within, self._amount, self._a_index, self._b_index = within, amount, a_index, b_index
        size_a, self._size_b = sizes.gather(1, a_index), sizes.gather(1, b_index)
        self._gifts = amount * size_a
        self._new_size_b = self._size_b + self._collect(self._gifts.unsqueeze(2)).squeeze(2)
        rest = 1 - amount
        rest = rest + (rest.clamp(0, 1) - rest).detach()  # the gradient passes the bounds unchanged
        self.sizes = sizes.scatter(1, a_index, size_a * rest).scatter(1, b_index, self._new_size_b)

    @property
    def shares(self) -> Tensor:
        """(B, A, K): how much of each token of A goes to which token of B."""
        return self._within * self._amount.unsqueeze(2)

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, D), in the dtype of x; differentiable in x, the metric and the old sizes."""
        values = at_least_float32(x)
        b, total = rows(values, self._b_index), self._new_size_b.unsqueeze(2)
        gifts = self._gifts.unsqueeze(2) * rows(values, self._a_index)
        some = total > 0  # a token that counts nothing and receives nothing stays as it is
        mean = (self._size_b.unsqueeze(2) * b + self._collect(gifts)) / torch.where(some, total, 1)
        merged = torch.where(some, mean, b).to(values.dtype)
        return values.scatter(1, self._b_index.unsqueeze(2).expand_as(merged), merged).to(x.dtype)

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """y: (B, N, D), as it is: no token has left."""
        return y

    def _collect(self, gifts: Tensor) -> Tensor:
        """Sum of what each token of B is given: (B, A, D) -> (B, K, D)."""
        with without_autocast(gifts):
            return self._within.mT @ gifts.to(self._within.dtype)
