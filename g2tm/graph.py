"""Graph-guided token merging (G2TM): connected components of similar neighboring patches become one token."""

import torch
from torch import Tensor

from g2tm.components import HAS_TRITON, check_backend, grid_components, propagated_components, strongest_components
from g2tm.reduction import Grouping
from g2tm.selection import at_least_float32, images_in, selection
from g2tm.similarity import LOWEST, row_dot
from g2tm.validation import check_batch, check_grid, check_threshold, check_tokens

EPS = 1e-12  # of `torch.nn.functional.normalize`: smallest norm that a token is divided by


@selection
def edge_similarities(x: Tensor, grid: tuple[int, int], backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Cosine similarity of neighboring patches.

    Args:
        x, grid: see `g2tm`.
        backend: see `graph_merge`; Triton's kernel compares in float32, so float64 tokens are left to torch.

    Returns:
        (right, down): (B, gh, gw-1) and (B, gh-1, gw), float32 (float64 for float64 tokens), from -1 to 1; on the
        CPU for the backends of the CPU.
    """
    check_grid(grid, x.shape[1])
    check_backend(backend, x.device)
    on_cuda = backend == "auto" and x.device.type == "cuda" and HAS_TRITON
    if (on_cuda or backend == "triton") and x.dtype != torch.float64:
        from g2tm.triton_components import edge_similarities as in_one_launch

        return in_one_launch(x, *grid, EPS)
    x = x.cpu() if backend == "opencv" else x
    x = at_least_float32(x).unflatten(1, tuple(grid))
    inner = torch.linalg.vecdot if backend == "torch" else row_dot
    norm = inner(x, x).sqrt_().clamp_(min=EPS)
    right = inner(x[:, :, :-1], x[:, :, 1:]).div_(norm[:, :, :-1]).div_(norm[:, :, 1:])
    down = inner(x[:, :-1], x[:, 1:]).div_(norm[:, :-1]).div_(norm[:, 1:])
    return right.clamp_(-1, 1), down.clamp_(-1, 1)


@selection
def graph_merge(
    x: Tensor,
    grid: tuple[int, int],
    threshold: float | None,
    *,
    tokens: int | None = None,
    sizes: Tensor | None = None,
    padding: Tensor | None = None,
    batch: str = "ragged",
    backend: str = "auto",
) -> Grouping:
    """Merge every connected component of similar neighbors into one token (G2TM).

    Patches are the nodes of the 4-neighbor grid; an edge survives if the cosine similarity of its ends
    exceeds the threshold. Groups are in the row-major order of their first patch.

    Args:
        x, grid, sizes, padding, batch: see `g2tm`; padding goes with a threshold.
        threshold: cosine similarity; not used, and may be None, with `tokens`.
        tokens: instead, merge along the most similar edges of every image until exactly so many are left, from 1 to N.
        backend: finds similarities and components: "torch", on any device; "triton", on CUDA; "opencv", on the CPU
            wherever x is; "auto": the fastest for the device.
    """
    check_batch(batch)
    if tokens is None:
        check_threshold(threshold)
    else:
        check_tokens(tokens, 1, x.shape[1], padding)
    right, down = edge_similarities(x, grid, backend)  # checks the grid and the backend
    if images_in(x) == 0:
        return Grouping.identity(x, sizes)
    if padding is not None:  # each of its slots is a component, the last ones
        right, down = _without(padding.unflatten(1, tuple(grid)).to(right.device), right, down)
    if tokens is None:
        assert threshold is not None  # checked above
        if torch.compiler.is_exporting():  # nobody can read the counts
            assignment, counts = propagated_components(right > threshold, down > threshold)
            counts = counts if padding is None else counts - padding.sum(1)
            return Grouping.of_counts(assignment, counts, sizes, padding)
        assignment, counts, lengths = grid_components(right > threshold, down > threshold, backend)
        if batch == "ragged" or min(lengths) == max(lengths):
            assignment, counts = assignment.to(x.device), counts.to(x.device)
            if padding is None:
                return Grouping(assignment, counts, lengths, sizes)
            return Grouping.of_counts(assignment, counts - padding.sum(1), sizes, padding)
        tokens = max(lengths)  # the edges that it takes are all above the threshold
    assignment = strongest_components(right, down, tokens, backend).to(x.device)
    if padding is None:
        return Grouping.of_length(assignment, tokens, sizes)
    return Grouping.of_counts(assignment, tokens - padding.sum(1), sizes, padding)


def _without(padding: Tensor, right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The similarities, but -inf at the edges of padding, (B, gh, gw)."""
    beside, below = padding[:, :, :-1] | padding[:, :, 1:], padding[:, :-1] | padding[:, 1:]
    return right.masked_fill(beside, LOWEST), down.masked_fill(below, LOWEST)
