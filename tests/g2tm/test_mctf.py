"""MCTF against loops over the whole sequence: parity, both directions, ties, padding, few tokens."""

import pytest
import torch
from torch.nn.functional import normalize

from g2tm import mctf
from tests.g2tm.padding import check_padding

TAUS = ((1, 0, 0), (1, 20, 40), (0.5, 0, 3), (0, 2, 0))


def reference(x, prefix, r, importance, sizes, tau, bidirectional):
    """x: (P + N, D), with prefix tokens -> groups of patches, in the order of the result."""
    unit = normalize(x, dim=-1)
    cos, n = (unit @ unit.T).tolist(), len(x)
    r = min(r, (n - prefix) // 2)

    def attraction(i, j):
        value = 1.0 if tau[0] == 0 else max((cos[i][j] + 1) / 2, 0) ** (1 / tau[0])
        for criterion, temperature in ((importance, tau[1]), (sizes, tau[2])):
            if temperature != 0:
                value *= (1 / float(criterion[i] * criterion[j])) ** (1 / temperature)
        return value

    a, b = ([token for token in range(prefix, n) if token % 2 == parity] for parity in (0, 1))
    groups, r_first = {token: [token] for token in range(prefix, n)}, r // 2 if bidirectional else r

    def move(sources, targets, count):
        if not targets or not sources:
            return sources
        best = {token: max(targets, key=lambda other: attraction(token, other)) for token in sources}
        order = sorted(sources, key=lambda token: -attraction(token, best[token]))
        for token in order[:count]:
            groups[best[token]] += groups.pop(token)
        return order[count:]

    left = sorted(move(a, b, r_first))
    rest = move(b, left, r - r_first) if bidirectional else b
    return [[token - prefix for token in groups[token]] for token in left + rest]


def test_it_fuses_what_the_definition_fuses():
    """On the whole sequence, whose prefix tokens take no part, but decide on the parity of the patches."""
    for prefix in (0, 1, 2, 5):
        for n_tokens in (2, 3, 4, 9, 14):
            for r in (1, 4, 100):
                for tau in TAUS:
                    for bidirectional in (False, True):
                        whole = torch.randn(prefix + n_tokens, 6).double()
                        weights, sizes = torch.rand(prefix + n_tokens).double() + 0.1, torch.ones(prefix + n_tokens)
                        sizes[prefix:] = torch.randint(1, 5, (n_tokens,)).float()
                        rule = {"tau": tau, "bidirectional": bidirectional}
                        groups = reference(whole, prefix, r, weights, sizes, **rule)
                        given = {"importance": weights[None, prefix:], "sizes": sizes[None, prefix:]}
                        patches = whole[None, prefix:]
                        step = mctf(patches, r=r, odd_first=prefix % 2 == 1, **given, **rule)
                        assert step.lengths == (len(groups),)
                        merged, own = step.merge(patches)[0], (weights * sizes)[prefix:]
                        for index, group in enumerate(groups):
                            found = (step.assignment[0] == index).nonzero().flatten().tolist()
                            assert found == sorted(group), (prefix, n_tokens, r, tau, bidirectional)
                            mean = (patches[0, group] * own[group, None]).sum(0) / own[group].sum()
                            torch.testing.assert_close(merged[index], mean, atol=1e-6, rtol=1e-6)
                            assert step.sizes[0, index] == sizes[prefix:][group].sum()


def test_of_equal_tokens_the_first_come_first():
    given = {"importance": torch.ones(1, 6), "bidirectional": False}
    for odd_first, expected in ((True, [[2, 2, 3, 0, 4, 1]]), (False, [[2, 2, 0, 3, 1, 4]])):
        assert mctf(torch.ones(1, 6, 3), r=1, odd_first=odd_first, **given).assignment.tolist() == expected


def test_attention_that_underflows_and_bad_tokens_leave_finite_numbers():
    x = torch.randn(2, 12, 4)
    step = mctf(x, r=5, importance=torch.zeros(2, 12), tau=(1, 20, 40))
    assert step.merge(x).isfinite().all() and step.lengths == (7, 7)
    torch.testing.assert_close(step.sizes.sum(1), torch.full((2,), 12.0))


def test_padding_makes_no_difference():
    tensors = {name: torch.rand(4, 11) + 0.1 for name in ("importance", "sizes")}
    x = torch.randn(4, 11, 5)
    for odd_first in (False, True):
        for bidirectional in (False, True):

            def merge(y, odd_first=odd_first, bidirectional=bidirectional, **given):
                return mctf(y, r=4, tau=(1, 20, 40), odd_first=odd_first, bidirectional=bidirectional, **given)

            assert check_padding(merge, (11, 6, 1, 0), x=x, y=x, **tensors).lengths == (7, 3, 1, 0)


def test_few_tokens_and_no_images():
    for odd_first in (False, True):
        for bidirectional in (False, True):
            for n_images, n_tokens, left in ((2, 0, 0), (2, 1, 1), (2, 2, 1), (2, 3, 2), (0, 5, 5)):
                x, given = torch.randn(n_images, n_tokens, 4), {"importance": torch.rand(n_images, n_tokens)}
                step = mctf(x, r=7, odd_first=odd_first, bidirectional=bidirectional, **given)
                assert step.merge(x).shape == (n_images, left, 4) and step.padding is None
                assert step.unmerge(step.merge(x)).shape == x.shape


def test_a_wrong_number_is_refused():
    for r in (-1, 1.5, True):
        with pytest.raises(ValueError, match="number of tokens"):
            mctf(torch.randn(1, 8, 3), r=r, importance=torch.ones(1, 8))
