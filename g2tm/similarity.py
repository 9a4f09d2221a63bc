"""Cosine similarities of tokens, and the search for the most similar one, never with all of them in memory."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.selection import at_least_float32, numpy_helps, rows, selection, true_positions

MAX_SIMILARITIES = 2**24  # that are held at once: bounds the memory of long sequences
LOWEST = float("-inf")  # similarity of what may not be chosen


def unit_vectors(x: Tensor) -> Tensor:
    """x: (..., D) -> (..., D), in at least float32, of length 1; zero vectors stay."""
    return F.normalize(at_least_float32(x), dim=-1)


def exact_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in float32 also where a setting of PyTorch lets such products be computed in TF32 or bfloat16."""
    if a.dtype != torch.float32 or _float32_is_exact():
        return a @ b
    return (a.double() @ b.double()).float()


def _float32_is_exact() -> bool:
    backends = torch.backends.cuda, torch.backends.mkldnn
    return all(backend.matmul.fp32_precision in ("none", "ieee") for backend in backends)


# As by `torch.compiler.assume_constant_result`, which would import Dynamo, in more time than the rest of PyTorch takes.
# Dynamo compiles anew when these settings change.
_float32_is_exact._dynamo_marked_constant = True  # type: ignore[attr-defined]


def row_dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner products over the last axis: two (..., D) of one dtype, without gradients -> (...).

    NumPy's need no matrix of all products on the CPU.
    """
    if numpy_helps(a):
        return torch.from_numpy(np.asarray(np.vecdot(a.detach().numpy(), b.detach().numpy())))
    return torch.linalg.vecdot(a, b)


def diagonal(product: Tensor, first: int) -> Tensor:
    """True where a token meets itself in the products, (B, i, J), of some, from `first` on, with all: (i, J)."""
    position = torch.arange(product.shape[2], device=product.device)
    return position == position[first : first + product.shape[1], None]


def first_maximum(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values, indices) of the largest number of the last axis, of equal ones the first; NaN is the largest.

    x: (..., K), without gradients. NumPy's is ten times as fast on the CPU.
    """
    if numpy_helps(x):
        indices = torch.from_numpy(np.asarray(x.detach().numpy().argmax(-1)))
        return x.gather(-1, indices.unsqueeze(-1)).squeeze(-1), indices
    return x.max(dim=-1)


def chunks(a: Tensor, columns: int) -> Iterator[Tensor]:
    """Parts of (B, I, D) along I, whose products with so many columns may be held at once; at least one."""
    if torch.compiler.is_exporting():  # nobody knows how many images there will be
        yield a
        return
    yield from a.split(max(1, MAX_SIMILARITIES // max(len(a) * columns, 1)), dim=1)


def most_similar(
    a: Tensor, b: Tensor, hidden: Tensor | None = None, change: Callable[[Tensor, int], object] | None = None
) -> tuple[Tensor, Tensor]:
    """Find the b with the largest inner product for every a, never all products at once.

    Args:
        a, b: (B, I, D) and (B, J, D).
        hidden: (B, J) or (J,), bool, True for a b that does not count: its products are -inf.
        change: changes products in place, (B, i, J), of some a, the first of which has the given index.

    Returns:
        (values, indices), (B, I) each; of equal ones the first, and NaN is the largest.
    """
    transposed, best, first = b.transpose(1, 2), [], 0
    for part in chunks(a, b.shape[1]):
        product = exact_product(part, transposed)
        if change is not None:
            change(product, first)
        if hidden is not None:
            product.masked_fill_(hidden.unsqueeze(-2), LOWEST)
        best.append(first_maximum(product))
        first += part.shape[1]
    if len(best) == 1:
        return best[0]
    values, indices = zip(*best, strict=True)
    return torch.cat(values, dim=1), torch.cat(indices, dim=1)


@selection
def tie_pruned(
    x: Tensor, result: Tensor, assignment: Tensor, pruned: Tensor, most: int, gone: Tensor | None = None
) -> Tensor:
    """Tie every pruned token to the most similar one of the result, whose features it gets back in the end.

    The papers of pruning methods do not say what a pruned position of a dense prediction is given.

    Args:
        x, result: (B, N, D) and (B, M, D), the tokens before the step, and after it without the pruned ones; M > 0.
        assignment, pruned: (B, N), the former for the tokens that are not pruned; bool.
        most: the largest number of pruned tokens in an image, or more.
        gone: (B, M), bool, True for padding, or for masked tokens of the result; None: there are none.

    Returns:
        The whole assignment; it ties to position 0 where an image has no token left.
    """
    if most == 0:
        return assignment
    candidates = true_positions(pruned, most)
    _, nearest = most_similar(unit_vectors(rows(x, candidates)), unit_vectors(result), gone)
    nearest = nearest.where(pruned.gather(1, candidates), assignment.gather(1, candidates))
    return assignment.scatter(1, candidates, nearest)
