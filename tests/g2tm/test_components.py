"""Connected components of the grid: every backend against a textbook search, worst cases, numbering."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import networkx
import pytest
import torch

from g2tm import components
from g2tm.components import BACKENDS, MAX_ON_CHIP, grid_components, propagation_rounds
from tests.g2tm import oracle

FAST = [backend for backend in BACKENDS if backend != "triton"]
GRIDS = [(8, 8), (5, 11), (1, 7), (7, 1), (1, 1), (2, 2), (3, 200), (200, 3), (33, 32)]


def random_edges(grid, density, n_images=2):
    gh, gw = grid
    return torch.rand(n_images, gh, gw - 1) < density, torch.rand(n_images, gh - 1, gw) < density


def edges_of_path(steps, grid):
    """Masks of one image from the patches on a path."""
    right, down = torch.zeros(1, grid[0], grid[1] - 1).bool(), torch.zeros(1, grid[0] - 1, grid[1]).bool()
    for (row, column), (next_row, next_column) in pairwise(steps):
        mask = right if row == next_row else down
        mask[0, min(row, next_row), min(column, next_column)] = True
    return right, down


def spiral(grid):
    """All patches, from a corner inwards."""
    row, column, step, seen = 0, 0, (0, 1), []
    free = {(i, j) for i in range(grid[0]) for j in range(grid[1])}
    while free:
        seen.append((row, column))
        free.discard((row, column))
        if (row + step[0], column + step[1]) not in free:
            step = step[1], -step[0]
        row, column = row + step[0], column + step[1]
    return edges_of_path(seen, grid)


def snake(grid):
    """All patches, row by row, there and back."""
    rows = [[(i, j) for j in range(grid[1])] for i in range(grid[0])]
    return edges_of_path([patch for i, row in enumerate(rows) for patch in (row[::-1] if i % 2 else row)], grid)


def comb(grid):
    """Every second column, joined in the last row."""
    right, down = torch.zeros(1, grid[0], grid[1] - 1).bool(), torch.zeros(1, grid[0] - 1, grid[1]).bool()
    right[:, -1], down[:, :, ::2] = True, True
    return right, down


def star(grid):
    """The middle row, with every column hanging on it."""
    right, down = comb(grid)
    right[:, -1], right[:, grid[0] // 2], down[:] = False, True, True
    return right, down


def maze(grid):
    """One long corridor with dead ends: a depth-first walk through all patches."""
    graph, generator = networkx.grid_2d_graph(*grid), torch.Generator().manual_seed(1)
    seen, stack, parts = {(0, 0)}, [(0, 0)], []
    while stack:
        fresh = [patch for patch in graph[stack[-1]] if patch not in seen]
        if not fresh:
            stack.pop()
            continue
        patch = fresh[torch.randint(len(fresh), (), generator=generator)]
        parts.append((stack[-1], patch))
        seen.add(patch)
        stack.append(patch)
    right, down = torch.zeros(1, grid[0], grid[1] - 1).bool(), torch.zeros(1, grid[0] - 1, grid[1]).bool()
    for (row, column), (next_row, next_column) in parts:
        mask = right if row == next_row else down
        mask[0, min(row, next_row), min(column, next_column)] = True
    return right, down


WINDING = [spiral, snake, comb, star, maze]


def turned(right, down):
    """The same edges in the four mirror images and across the diagonal, as (right, down) each."""
    for dims in ((), (1,), (2,), (1, 2)):
        yield right.flip(dims), down.flip(dims)
    yield down.transpose(1, 2), right.transpose(1, 2)


def assert_same(found, expected):
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[2] == expected[2] == expected[1].tolist()
    assert found[0].dtype == found[1].dtype == torch.int64


def test_backends_agree_with_the_oracle():
    for grid in GRIDS:
        for density in (0.0, 0.3, 0.5, 0.7, 1.0):
            edges = random_edges(grid, density)
            expected = oracle.components(*edges)
            for backend in FAST:
                assert_same(grid_components(*edges, backend), expected)


def test_components_are_numbered_by_their_first_patch():
    right = torch.tensor([[[0, 1], [1, 0]], [[0, 0], [1, 1]]]).bool()
    down = torch.tensor([[[0, 0, 1]], [[0, 1, 0]]]).bool()
    for backend in FAST:
        assignment, counts, lengths = grid_components(right, down, backend)
        assert assignment.tolist() == [[0, 1, 1, 2, 2, 1], [0, 1, 2, 1, 1, 1]]
        assert counts.tolist() == [3, 3] and lengths == [3, 3]


def test_winding_components_are_found_whole():
    for shape in WINDING:
        for grid in ((16, 16), (9, 14)):
            for edges in turned(*shape(grid)):
                expected = oracle.components(*edges)
                for backend in FAST:
                    assert_same(grid_components(*edges, backend), expected)


@pytest.mark.parametrize("shape", [*WINDING, *(lambda grid, p=p: random_edges(grid, p, 3) for p in (0.4, 0.5, 0.6))])
def test_propagation_settles_in_the_rounds_it_is_given(shape):
    """With one to spare, up to the largest grid; the same labels as OpenCV's, whose search may run in parallel."""
    for side in (16, 32, 64, 128):
        for edges in turned(*shape((side, side))):
            assignment, counts = components.propagated_components(*edges, propagation_rounds(side * side) - 1)
            expected = grid_components(*edges, "opencv")
            assert torch.equal(assignment, expected[0]) and torch.equal(counts, expected[1])


def test_propagation_settles_on_lines():
    for length in (1, 2, 3, 1000, 16384):
        line, across = torch.ones(1, 1, length - 1).bool(), torch.ones(1, 0, length).bool()
        for edges in ((line, across), (across.transpose(1, 2), line.transpose(1, 2))):
            assert components.propagated_components(*edges)[1].tolist() == [1]


def test_unsettled_images_are_marked_and_finished(monkeypatch):
    edges = [
        torch.cat([wound, alone]) for wound, alone in zip(snake((32, 32)), random_edges((32, 32), 0, 1), strict=True)
    ]
    assert components.propagated_components(*edges, 1)[1].tolist() == [0, 1024]
    monkeypatch.setitem(BACKENDS, "torch", lambda right, down: components.propagated_components(right, down, 1))
    assert_same(grid_components(*edges, "torch"), oracle.components(*edges))


def test_opencv_labels_in_any_order_are_renumbered():
    """OpenCV promises no order of its labels."""
    for _ in range(50):
        labels = torch.randint(6, (2, 30)) + torch.tensor([[0], [6]])
        shuffled = torch.randperm(12)[labels]
        shuffled = shuffled.unique(return_inverse=True)[1] + 1  # without gaps
        assignment, counts = components._first_seen_order(shuffled.numpy())
        for image in range(2):
            seen = list(dict.fromkeys(shuffled[image].tolist()))
            assert assignment[image].tolist() == [seen.index(label) for label in shuffled[image].tolist()]
            assert counts[image] == len(seen)


def test_large_batches_equal_the_oracle():
    edges = random_edges((128, 128), 0.5, 4)
    assert_same(grid_components(*edges), oracle.components(*edges))


def test_triton_labels_grids_that_fit_on_a_chip(monkeypatch):
    """Its tile has sides of powers of two: 65×63 patches fill one of 128×64, and 4,096 patches may be too many."""
    masks = {
        grid: (torch.ones(1, grid[0], grid[1] - 1).bool(), torch.ones(1, grid[0] - 1, grid[1]).bool())
        for grid in ((64, 64), (65, 63), (63, 65), (33, 64), (2, 2048), (3, 1365), (1, 4096), (1, 4097))
    }
    monkeypatch.setattr(components, "HAS_TRITON", True)
    monkeypatch.setattr(components, "check_backend", lambda backend, device: None)
    found = {}
    for grid, (right, down) in masks.items():
        right = OnCuda(right)
        found[grid] = components._chosen("auto", right, down)
    assert found == {
        (64, 64): "triton",
        (65, 63): "torch",
        (63, 65): "torch",
        (33, 64): "triton",
        (2, 2048): "triton",
        (3, 1365): "torch",
        (1, 4096): "triton",
        (1, 4097): "torch",
    }
    assert MAX_ON_CHIP * 8 == 32 * 1024


class OnCuda:
    """Stands for a mask on a GPU."""

    device = torch.device("cuda")

    def __init__(self, mask):
        self.shape = mask.shape


IN_INTERPRETER = """
import torch
from g2tm.components import grid_components
from g2tm.graph import EPS, edge_similarities, graph_merge
from g2tm.triton_components import edge_similarities as in_one_launch
from tests.g2tm import oracle

torch.manual_seed(0)
x = torch.randn(2, 64, 6)
for arguments in ({"threshold": 0.3}, {"threshold": 0.3, "batch": "uniform"}, {"threshold": None, "tokens": 40}):
    found, expected = (graph_merge(x, (8, 8), **arguments, backend=backend) for backend in ("triton", "auto"))
    assert torch.equal(found.assignment, expected.assignment), arguments
assert graph_merge(x[:0], (8, 8), 0.3, backend="triton").lengths == ()
for gh, gw in ((1, 1), (1, 7), (7, 1), (5, 6), (8, 8)):
    for density in (0, 0.5, 0.8, 1):
        edges = torch.rand(2, gh, gw - 1) < density, torch.rand(2, gh - 1, gw) < density
        found, expected = grid_components(*edges, "triton"), oracle.components(*edges)
        assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1]), (gh, gw, density)
    x = torch.randn(2, gh * gw + 1, 70)[:, 1:]
    x[0, 0] = 0
    for dtype in (torch.float32, torch.bfloat16):
        for one, other in zip(in_one_launch(x.to(dtype), gh, gw, EPS), edge_similarities(x.to(dtype), (gh, gw))):
            torch.testing.assert_close(one, other)
    x[:, -1] = float("nan")
    for one, other in zip(in_one_launch(x, gh, gw, EPS), edge_similarities(x, (gh, gw))):
        torch.testing.assert_close(one, other, equal_nan=True)
"""


@pytest.mark.nightly
def test_triton_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", IN_INTERPRETER], cwd=root, env=environment, check=True)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_components_of_the_cpu():
    for grid in (*GRIDS, (64, 64), (128, 128)):
        edges = random_edges(grid, 0.5)
        expected = grid_components(*edges)
        for backend in ("auto", "triton", "torch"):
            found = grid_components(*(mask.cuda() for mask in edges), backend)
            assert torch.equal(found[0].cpu(), expected[0]) and torch.equal(found[1].cpu(), expected[1])
