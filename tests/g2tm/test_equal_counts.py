"""A budget equal to the count which a threshold gives: the same partition."""

import pytest
import torch

from g2tm import bipartite, clap, graph_merge
from tests.helpers import by_speed

GRIDS = [(8, 8), (5, 11), (11, 5), (2, 3), (1, 12), (12, 1), (16, 9)]
THRESHOLDS = (-1.0, -0.2, 0.0, 0.3, 0.6, 0.9, 1.0)


def tokens(grid, n_images=3):
    """Batches of different images: smooth ones, ones with few different tokens (ties), equal ones, some with NaN."""
    n_tokens = grid[0] * grid[1]
    noise = torch.randn(n_images, 6, *grid) + torch.linspace(0, 1, n_images).view(-1, 1, 1, 1)
    yield torch.nn.functional.avg_pool2d(noise, 3, 1, 1).flatten(2).transpose(1, 2)
    yield torch.eye(4)[torch.randint(3, (n_images, n_tokens))]
    yield torch.randint(-1, 2, (n_images, n_tokens, 3)).float()
    yield torch.ones(n_images, n_tokens, 3)
    bad = torch.randn(n_images, n_tokens, 4)
    bad[:, 1::5] = float("nan")
    yield bad


def check(merge, x, threshold, budget):
    """merge(x, options): image by image, and the batch as a whole where all its images keep equally many."""
    for batch in (*x.split(1), x):
        expected = merge(batch, {"threshold": threshold, "batch": "uniform"})
        found = merge(batch, budget(expected.lengths[0]))
        assert found.lengths == expected.lengths and torch.equal(found.counts, expected.counts)
        assert torch.equal(found.assignment, expected.assignment)
    return set(merge(x, {"threshold": threshold}).lengths)


def budget(count):
    return {"threshold": None, "tokens": count}


@pytest.mark.parametrize("backend", by_speed(["auto", "torch"], slow=["torch"]))
def test_graph(backend):
    for grid in GRIDS:
        for x in tokens(grid):
            for threshold in THRESHOLDS:
                given = {"grid": grid, "backend": backend}
                check(lambda x, more, given=given: graph_merge(x, **given, **more), x, threshold, budget)


def test_clap():
    numbers = set()
    for window in ((2, 2), (1, 2), (3, 2)):
        for grid in GRIDS:
            if window[0] > grid[0] or window[1] > grid[1]:
                continue
            for x in tokens(grid):
                for threshold in THRESHOLDS:
                    given = {"grid": grid, "window": window}
                    numbers |= check(lambda x, more, given=given: clap(x, **given, **more), x, threshold, budget)
    assert len(numbers) > 20


def test_global_matching():
    """GBM, with a fixed and with the adaptive threshold."""
    for grid in GRIDS:
        for odd_first in (True, False):
            for x in tokens(grid):
                for threshold in (*THRESHOLDS, "adaptive"):
                    rule = {"layer": 3, "odd_first": odd_first}
                    check(lambda x, more, rule=rule: bipartite(x, **rule, **more), x, threshold, budget)
