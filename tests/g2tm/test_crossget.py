"""CrossGET against loops over tokens: ranking, importance, protected tokens, ties, padding, few tokens."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from g2tm import crossget
from tests.g2tm.padding import check_padding


def reference(metric, x, r, importance, sizes, suffix):
    """(N, ...) each -> target of every token, and the values of the destinations."""
    unit = normalize(metric, dim=-1)
    cos, n = torch.maximum(unit @ unit.T, (unit @ unit.T).T).tolist(), len(unit)
    open_tokens = list(range(n - suffix)) if suffix else list(range(n))
    r = min(r, n // 2, max(len(open_tokens) - 1, 0))
    nearest = {i: max((cos[i][j] for j in open_tokens if j != i), default=-math.inf) for i in open_tokens}
    order = sorted(open_tokens, key=lambda i: -nearest[i])
    later = {i: max((cos[i][j] for j in order[rank + 1 :]), default=-math.inf) for rank, i in enumerate(order)}
    shift = [0.0] * n if importance is None else importance.tolist()
    sources = sorted(open_tokens, key=lambda i: -(later[i] - shift[i]))[:r]
    targets = {i: i for i in range(n)}
    for i in sources:
        targets[i] = max((d for d in open_tokens if d not in sources), key=lambda d: cos[i][d])
    values = []
    for d in range(n):
        if d in sources:
            continue
        total, size = sizes[d] * x[d], sizes[d]
        for i in sources:
            if targets[i] == d:
                u, v = 2 * torch.tensor([shift[i], shift[d]], dtype=torch.float64).softmax(0)
                total, size = total + u * sizes[i] * x[i] + (v - 1) * sizes[d] * x[d], size + sizes[i]
        values.append(total / size)
    return [targets[i] for i in range(n)], torch.stack(values)


def test_it_merges_what_the_definition_merges():
    for n_tokens in (2, 3, 5, 12, 20):
        for r in (1, 4, 100):
            for suffix in (0, 1, 3):
                for weighted in (False, True):
                    metric, x = torch.randn(2, 1, n_tokens, 6).double()
                    sizes = torch.randint(1, 5, (1, n_tokens)).double()
                    importance = torch.randn(1, n_tokens).double() if weighted else None
                    step = crossget(metric, r=r, importance=importance, sizes=sizes, suffix=suffix)
                    given = None if importance is None else importance[0]
                    targets, values = reference(metric[0], x[0], r, given, sizes[0], suffix)
                    stay = sorted(set(targets))
                    assert step.assignment[0].tolist() == [stay.index(target) for target in targets]
                    torch.testing.assert_close(step.merge(x)[0], values, atol=1e-6, rtol=1e-6)
                    torch.testing.assert_close(step.sizes.sum(), sizes.sum().float())


def test_tokens_that_are_each_others_nearest_tie():
    """The lower position ranks first, and becomes the source."""
    metric = torch.eye(5).repeat_interleave(2, 0)[None]
    step = crossget(metric, r=5)
    assert step.assignment.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]
    step = crossget(metric, r=2)
    assert step.assignment.tolist() == [[0, 0, 1, 1, 2, 3, 4, 5, 6, 7]]


def test_padding_makes_no_difference():
    tensors = {name: torch.randn(4, 11, 5) for name in ("metric", "x")} | {"sizes": torch.rand(4, 11) + 1}
    for suffix in (0, 1):
        for more in ({}, {"importance": torch.randn(4, 11)}):

            def merge(metric, suffix=suffix, **given):
                return crossget(metric, r=4, suffix=suffix, **given)

            assert check_padding(merge, (11, 6, 1, 0), **tensors, **more).lengths == (7, 3, 1, 0)


def test_few_tokens_and_no_images():
    for suffix, lengths in ((0, (0, 1, 1, 2)), (1, (0, 1, 2, 2)), (9, (0, 1, 2, 3))):
        for n_tokens, left in enumerate(lengths):
            for given in ({}, {"importance": torch.rand(2, n_tokens)}):
                step, x = (
                    crossget(torch.randn(2, n_tokens, 4), r=7, suffix=suffix, **given),
                    torch.randn(2, n_tokens, 3),
                )
                assert step.merge(x).shape == (2, left, 3) and step.unmerge(step.merge(x)).shape == x.shape
    assert crossget(torch.randn(0, 5, 4), r=2).merge(torch.randn(0, 5, 3)).shape == (0, 5, 3)


def test_wrong_numbers_are_refused():
    for given in ({"r": -1}, {"r": True}, {"r": 1, "suffix": -1}):
        with pytest.raises(ValueError, match="give the number of tokens"):
            crossget(torch.randn(1, 8, 3), **given)
