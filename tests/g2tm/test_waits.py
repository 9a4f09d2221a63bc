"""Waits of a merge for the device: whenever a tensor becomes a number, or its values decide on a shape."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from g2tm import (
    Grouping,
    bipartite,
    clap,
    components,
    crossget,
    dct,
    diffrate,
    fpet,
    fpet_training,
    graph_merge,
    ltmp,
    mctf,
    mutual_pairs,
    pitome,
    random_merge,
    tofu,
)
from tests.helpers import Reads, Waits

X = torch.randn(3, 64, 6, generator=torch.Generator().manual_seed(0)) + 0.5
SIZES = torch.ones(3, 64)
PADDING = torch.arange(64) >= torch.tensor([[64], [40], [57]])
MERGES = {
    "graph": (lambda: graph_merge(X, (8, 8), 0.5, backend="torch"), 1),
    "graph uniform": (lambda: graph_merge(X, (8, 8), 0.5, batch="uniform", backend="torch"), 1),
    "graph budget": (lambda: graph_merge(X, (8, 8), None, tokens=40, backend="torch"), 0),
    "graph uniform, on the CPU": (lambda: graph_merge(X, (8, 8), 0.5, batch="uniform"), 1),
    "graph budget, on the CPU": (lambda: graph_merge(X, (8, 8), None, tokens=40), 0),
    "clap budget": (lambda: clap(X, (8, 8), None, tokens=40), 0),
    "mutual": (lambda: mutual_pairs(X, sizes=SIZES), 1),
    "mutual uniform": (lambda: mutual_pairs(X, batch="uniform"), 1),
    "clap": (lambda: clap(X, (8, 8), 0.3), 1),
    "clap uniform": (lambda: clap(X, (8, 8), 0.3, batch="uniform"), 1),
    "gbm": (lambda: bipartite(X, threshold="adaptive", layer=3, sizes=SIZES), 1),
    "gbm uniform": (lambda: bipartite(X, threshold="adaptive", layer=3, batch="uniform"), 1),
    "tome": (lambda: bipartite(X, r=5), 0),
    "tome, even number of prefix tokens": (lambda: bipartite(X, r=5, odd_first=False), 0),
    "tome, nothing to match": (lambda: bipartite(X[:, :1], r=5), 0),
    "tome, sizes": (lambda: bipartite(X, r=5, sizes=SIZES), 0),
    "tome, budget": (lambda: bipartite(X, tokens=50, sizes=SIZES), 0),
    "tome, padding": (lambda: bipartite(X, r=5, sizes=SIZES, padding=PADDING), 1),
    "tofu": (lambda: tofu(X, r=5, prune=False), 0),
    "random": (lambda: random_merge(X, tokens=5, seed=3), 0),
    "clap, padding": (lambda: clap(X, (8, 8), 0.3, padding=PADDING), 1),
    "mutual, padding": (lambda: mutual_pairs(X, padding=PADDING), 1),
}


@pytest.mark.parametrize("name", MERGES)
def test_one_wait_at_most(name):
    merge, expected = MERGES[name]
    with Waits() as waits, Reads() as reads:
        reduction = merge()
        reduction.unmerge(reduction.merge(X[:, : reduction.assignment.shape[1]]))
        second = Grouping.of_length(torch.zeros(3, reduction.width, dtype=torch.long), 1)  # made without waiting
        reduction.then(second)
    assert (reads.count, waits.count) == (expected, 0)


def test_uniform_has_something_to_make_equal():
    """Else its second step would not run above."""
    for merge in (lambda: graph_merge(X, (8, 8), 0.5), lambda: mutual_pairs(X), lambda: clap(X, (8, 8), 0.3)):
        assert len(set(merge().lengths)) > 1


def test_a_device_is_asked_for_nothing():
    """On tensors without values, of a device that is not there: the way that tensors on a GPU take."""
    with FakeTensorMode():
        x, sizes = torch.randn(3, 64, 6, device="cuda"), torch.ones(3, 64, device="cuda")
        steps = [
            graph_merge(x, (8, 8), None, tokens=40, backend="torch"),
            clap(x, (8, 8), None, tokens=40),
            clap(x, (8, 8), None, tokens=41),  # the last window merges in part
            bipartite(x, r=5, sizes=sizes),
            tofu(x, r=5, prune=True, sizes=sizes),
            dct(x, r=5),
            random_merge(x, tokens=40, seed=3),
            *(pitome(x, r=5, margin=0.5, variant=variant, sizes=sizes) for variant in ("bsm", "energy")),
            *(mctf(x, r=5, importance=sizes, tau=(1, 20, 40), odd_first=odd_first) for odd_first in (False, True)),
            *(crossget(x, r=5, importance=importance, sizes=sizes) for importance in (None, sizes)),
            diffrate(x, importance=sizes, kept=50, merged=40, sizes=sizes),
            fpet(x, (8, 8), sizes=sizes),
            fpet_training(x, (8, 8)),
            ltmp(x, x, importance=sizes, merge_threshold=0.9, prune_threshold=0.0, tokens=40, sizes=sizes),
            ltmp(x, x, importance=sizes, merge_threshold=sizes[0, :1], prune_threshold=sizes[0, :1], tokens=40),
        ]
        for step in steps:
            assert step.unmerge(step.merge(x)).device.type == "cuda" and step.padding is None
        for merge in (
            lambda: graph_merge(x, (8, 8), 0.5, backend="torch"),
            lambda: clap(x, (8, 8), 0.5),
            lambda: bipartite(x, threshold=0.5),
            lambda: mutual_pairs(x),
        ):
            with pytest.raises(DataDependentOutputException):  # else nothing above could have failed
                merge()


def test_waiting_operations_are_seen():
    with Waits() as waits:
        X[X > 0]
        X.sum().item()
    assert waits.count >= 2
    with Reads() as reads:
        X.tolist()
        bool(X[0, 0, 0] > 0)
    assert reads.count == 2


def test_propagation_alone_reads_nothing():
    with Waits() as waits, Reads() as reads:
        components.propagated_components(torch.ones(2, 4, 3).bool(), torch.ones(2, 3, 4).bool())
    assert reads.count == waits.count == 0


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize(("arguments", "expected"), [({}, 1), ({"batch": "uniform"}, 1), ({"tokens": 40}, 0)])
def test_cuda_waits_once(backend, arguments, expected):
    x = torch.randn(3, 64, 6, device="cuda") + 0.5
    assert count_waits(lambda: graph_merge(x, (8, 8), 0.5, **arguments, backend=backend), x) == expected


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_does_not_wait_for_a_budget_of_windows():
    x = torch.randn(3, 64, 6, device="cuda") + 0.5
    assert count_waits(lambda: clap(x, (8, 8), None, tokens=40), x) == 0
    assert count_waits(lambda: clap(x, (8, 8), 0.5), x) == 1
    assert count_waits(lambda: mutual_pairs(x), x) == 1


def count_waits(merge, x):
    """How often CUDA says that it was waited for."""
    merge()  # compiled now, not while counting
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reduction = merge()
            reduction.unmerge(reduction.merge(x))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


@pytest.mark.slow
def test_budgets_can_be_exported():
    """Nothing of the images that were exported with stays in the program."""

    class Merge(torch.nn.Module):
        def forward(self, x):
            steps = graph_merge(x, (8, 8), None, tokens=40), clap(x, (8, 8), None, tokens=41), bipartite(x, r=9)
            return [step.unmerge(step.merge(x)) for step in steps]

    program, others = torch.export.export(Merge(), (X,)).module(), torch.randn_like(X)
    for exported, expected in zip(program(others), Merge()(others), strict=True):
        torch.testing.assert_close(exported, expected)
