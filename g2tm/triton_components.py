"""The GPU form of what `graph` does before the merge: similarities of neighbors, and connected components.

One launch each, as an operator of its own: so a compiler, an export and tensors without values know its shapes. Tested
in Triton's interpreter, and compiled for NVIDIA architectures, but not yet run on a GPU.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# What Triton compiles is written in its language, whose annotations are no types.

import torch
import triton
import triton.language as tl
from torch import Tensor

UNLABELLED = tl.constexpr(2**30)  # larger than any patch's index


@torch.library.custom_op("g2tm::edge_similarities", mutates_args=())
def edge_similarities(x: Tensor, gh: int, gw: int, eps: float) -> tuple[Tensor, Tensor]:
    """As `g2tm.edge_similarities`, in float32 and one launch, each token read where it lies.

    x: (B, gh·gw, D), float32, float16 or bfloat16; eps: smallest norm that a token is divided by.
    """
    x = x if x.stride(-1) == 1 else x.contiguous()
    right, down = _empty_edges(x, gh, gw, eps)
    if len(x):
        _edge_similarities[(triton.cdiv(gh * gw, 16), len(x))](
            x, right, down, x.stride(0), x.stride(1), gh, gw, x.shape[2], eps, block=16, chunk=64
        )
    return right, down


@edge_similarities.register_fake
def _empty_edges(x: Tensor, gh: int, gw: int, eps: float) -> tuple[Tensor, Tensor]:
    right, down = (x.shape[0], gh, gw - 1), (x.shape[0], gh - 1, gw)
    return x.new_empty(right, dtype=torch.float32), x.new_empty(down, dtype=torch.float32)


@triton.jit
def _edge_similarities(
    x, right, down, image_stride, token_stride, gh, gw, features, eps, block: tl.constexpr, chunk: tl.constexpr
):
    """One program per `block` tokens of an image: their products with the token to the right and with that below."""
    image = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * block + tl.arange(0, block)
    row, column = token // gw, token % gw
    here = token < gh * gw
    has_right, has_down = here & (column < gw - 1), here & (row < gh - 1)
    rows = x + image * image_stride + token[:, None].to(tl.int64) * token_stride
    squares = tl.zeros([block], tl.float32)
    right_squares, right_products, down_squares, down_products = squares, squares, squares, squares
    for first in range(0, features, chunk):
        feature = (first + tl.arange(0, chunk))[None, :]
        inside = feature < features
        own = tl.load(rows + feature, mask=here[:, None] & inside, other=0).to(tl.float32)
        beside = tl.load(rows + token_stride + feature, mask=has_right[:, None] & inside, other=0).to(tl.float32)
        below = tl.load(rows + gw * token_stride + feature, mask=has_down[:, None] & inside, other=0).to(tl.float32)
        squares += tl.sum(own * own, 1)
        right_squares += tl.sum(beside * beside, 1)
        right_products += tl.sum(own * beside, 1)
        down_squares += tl.sum(below * below, 1)
        down_products += tl.sum(own * below, 1)
    norm = _norm(squares, eps)
    tl.store(
        right + image * gh * (gw - 1) + row * (gw - 1) + column,
        _clamp(right_products / norm / _norm(right_squares, eps)),
        mask=has_right,
    )
    tl.store(
        down + image * (gh - 1) * gw + token, _clamp(down_products / norm / _norm(down_squares, eps)), mask=has_down
    )


@triton.jit
def _norm(squares, eps):
    """Square root, not below eps; NaN stays NaN."""
    norm = tl.sqrt(squares)
    return tl.where(norm < eps, eps, norm)


@triton.jit
def _clamp(cosine):
    """To -1 … 1; NaN stays NaN."""
    cosine = tl.where(cosine > 1, 1.0, cosine)
    return tl.where(cosine < -1, -1.0, cosine)


@torch.library.custom_op("g2tm::components", mutates_args=())
def components(right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Connected components of every image, in one launch of one program per image; its labels never leave the chip.

    From the edges that survive to (assignment, counts), all as in `g2tm.components.grid_components`.
    """
    n_images, gh, gw = len(right), right.shape[1], down.shape[2]
    assignment, counts = _empty_components(right, down)
    rank = torch.empty_like(assignment, dtype=torch.int32)
    edges = right.contiguous().view(torch.uint8), down.contiguous().view(torch.uint8)
    height, width = triton.next_power_of_2(gh), triton.next_power_of_2(gw)
    warps = min(max(height * width // 256, 4), 32)
    _components[(n_images,)](*edges, assignment, counts, rank, gh, gw, height, width, num_warps=warps)
    return assignment, counts


@components.register_fake
def _empty_components(right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    n_images, n_patches = right.shape[0], right.shape[1] * down.shape[2]
    return right.new_empty(n_images, n_patches, dtype=torch.int64), right.new_empty(n_images, dtype=torch.int64)


@triton.jit
def _components(right, down, assignment, counts, rank, gh, gw, height: tl.constexpr, width: tl.constexpr):
    """The smallest index runs along rows and columns, both ways, until nothing changes."""
    image = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, height)[:, None]
    column = tl.arange(0, width)[None, :]
    inside = (row < gh) & (column < gw)
    patch = row * gw + column
    across = right + image * gh * (gw - 1) + row * (gw - 1) + column
    along = down + image * (gh - 1) * gw + patch
    # A scan starts anew where no edge comes from the patch before, seen in its direction.
    from_left = tl.load(across - 1, mask=inside & (column > 0), other=0) == 0
    from_right = tl.load(across, mask=inside & (column < gw - 1), other=0) == 0
    from_above = tl.load(along - gw, mask=inside & (row > 0), other=0) == 0
    from_below = tl.load(along, mask=inside & (row < gh - 1), other=0) == 0

    labels = tl.where(inside, patch, UNLABELLED)
    changed = 1
    while changed > 0:
        before = labels
        labels = _run(labels, from_left, 1, False)
        labels = _run(labels, from_right, 1, True)
        labels = _run(labels, from_above, 0, False)
        labels = _run(labels, from_below, 0, True)
        changed = tl.max(tl.max((labels != before).to(tl.int32), 1), 0)

    is_root = (labels == patch) & inside
    in_row = tl.sum(is_root.to(tl.int32), 1)
    before_row = tl.cumsum(in_row, 0) - in_row
    number = before_row[:, None] + tl.cumsum(is_root.to(tl.int32), 1) - 1
    ranks = rank + image * gh * gw
    tl.store(ranks + patch, number, mask=is_root)
    tl.debug_barrier()  # other threads of this program read what these wrote
    tl.store(
        assignment + image * gh * gw + patch, tl.load(ranks + labels, mask=inside, other=0).to(tl.int64), mask=inside
    )
    tl.store(counts + image, tl.sum(in_row, 0).to(tl.int64))


@triton.jit
def _run(labels, starts, axis: tl.constexpr, reverse: tl.constexpr):
    """Minimum since the last start, along one axis."""
    return tl.associative_scan((labels, starts.to(tl.int32)), axis, _smaller_since_start, reverse=reverse)[0]


@triton.jit
def _smaller_since_start(label, started, next_label, next_started):
    return tl.where(next_started != 0, next_label, tl.minimum(label, next_label)), started | next_started
