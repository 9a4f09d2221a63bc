"""CubistMerge: a slow reference, values of groups, budgets."""

import pytest
import torch

from g2tm import cubist, rectangle
from g2tm.cubist import removed
from tests.helpers import Waits


def line_by_definition(tokens, r):
    """Groups of the tokens of one line, each with its target first, then the left and the right one: r of them go."""
    n = len(tokens)
    unit = [token / token.norm() for token in tokens]
    best = {}
    for odd in range(1, n, 2):
        sides = [(float(unit[odd] @ unit[odd - 1]), odd - 1)]
        if odd + 1 < n:
            sides.append((float(unit[odd] @ unit[odd + 1]), odd + 1))
        best[odd] = max(sides, key=lambda side: (side[0], -side[1]))
    leaving = sorted(best, key=lambda odd: (-best[odd][0], odd))[:r]
    groups = {place: [place] for place in range(n) if place not in leaving}
    for odd in sorted(leaving):
        groups[best[odd][1]].append(odd)
    return [groups[place] for place in sorted(groups)]


def largest(members):
    """The entry of largest magnitude of every channel."""
    stacked = torch.stack(members)
    return stacked.gather(0, stacked.abs().argmax(0, keepdim=True))[0]


def by_definition(x, grid, r_h, r_w):
    """Tokens and patches of each, of one image, (P, D)."""
    table = [[(x[y * grid[1] + z], [y * grid[1] + z]) for z in range(grid[1])] for y in range(grid[0])]
    for r in (r_w, r_h):
        reduced = []
        for line in table:
            groups = line_by_definition([token for token, _ in line], r)
            reduced.append(
                [(largest([line[i][0] for i in g]), sorted(p for i in g for p in line[i][1])) for g in groups]
            )
        table = [list(column) for column in zip(*reduced, strict=True)]
    return [cell for row in table for cell in row]


CASES = [((4, 6), 1, 2), ((5, 7), 2, 3), ((3, 3), 0, 1), ((6, 2), 3, 0), ((4, 5), 0, 0), ((2, 9), 1, 4), ((1, 4), 5, 5)]


def test_a_rectangle_is_that_of_the_definition():
    for grid, r_h, r_w in CASES:
        x = torch.randn(3, grid[0] * grid[1], 6)
        step = cubist(x, grid, remove=(r_h, r_w))
        merged, before = step.merge(x), x.clone()
        for index, image in enumerate(x):
            expected = by_definition(image, grid, min(r_h, grid[0] // 2), min(r_w, grid[1] // 2))
            torch.testing.assert_close(merged[index], torch.stack([token for token, _ in expected]))
            groups = [patches for _, patches in expected]
            assert [torch.where(step.assignment[index] == i)[0].tolist() for i in range(len(groups))] == groups
            assert step.sizes[index].tolist() == [len(group) for group in groups]
        assert torch.equal(x, before) and step.grid[0] * step.grid[1] == step.width
        y = torch.randn_like(merged)
        torch.testing.assert_close(step.unmerge(y), y.gather(1, step.assignment.unsqueeze(2).expand(-1, -1, 6)))


def test_other_values_of_a_group():
    x, sizes = torch.tensor([[[1.0, 0], [3, 0.1], [2, 0.1], [-9, 1]]]), torch.tensor([[1.0, 2, 1, 1]])
    for value, expected in (("entry", [3, 0.1]), ("token", [3, 0.1]), ("mean", [8 / 3, 0.1])):
        step = cubist(x, (1, 4), remove=(0, 1), value=value, sizes=sizes)
        torch.testing.assert_close(step.merge(x)[0, 1], torch.tensor(expected))
        assert step.sizes.tolist() == [[1, 3, 1]]
    x = torch.tensor([[[2.0, 1.0], [-2.0, -1.5]]])
    assert cubist(x, (1, 2), remove=(0, 1)).merge(x).tolist() == [[[2.0, -1.5]]]  # of equal ones the target's own


def test_gradients_reach_the_chosen_entries():
    x = torch.randn(2, 20, 4, requires_grad=True)
    cubist(x, (4, 5), remove=(1, 2)).merge(x).sum().backward()
    assert x.grad.unique().tolist() == [0, 1] and x.grad.sum() == 2 * 9 * 4


def test_zeros_equal_tokens_and_no_image():
    for x in (torch.zeros(1, 12, 3), torch.ones(2, 12, 3)):
        step = cubist(x, (3, 4), remove=(1, 2))
        assert torch.equal(step.merge(x), x[:, :4]) and step.grid == (2, 2)
        assert step.assignment[0].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3]
    assert cubist(torch.zeros(0, 12, 3), (3, 4), remove=(1, 1)).merge(torch.zeros(0, 12, 3)).shape == (0, 6, 3)


def test_nothing_to_wait_for():
    x = torch.randn(2, 30, 8).bfloat16()
    with Waits() as waits:
        step = cubist(x, (5, 6), remove=(1, 2))
        assert step.unmerge(step.merge(x)).dtype == torch.bfloat16
    assert waits.count == 0


def test_several_merges_compose():
    x = torch.randn(2, 48, 5)
    first = cubist(x, (6, 8), remove=(1, 2))
    second = cubist(first.merge(x), first.grid, remove=(2, 0), sizes=first.sizes)
    total = first.then(second)
    assert total.grid == (3, 6) and total.sizes.sum(1).tolist() == [48, 48]
    torch.testing.assert_close(total.merge(x), second.merge(first.merge(x)))
    torch.testing.assert_close(total.unmerge(total.merge(x)), first.unmerge(second.unmerge(total.merge(x))))


def test_shares_and_budgets():
    assert removed((0.25, 0.25), (6, 10)) == (2, 2) and removed((0.1, 0), (14, 14)) == (1, 0)
    assert rectangle(0.5, (40, 40)) == (28, 28) and rectangle(1.0, (5, 9)) == (5, 9)
    for tokens in range(12, 6 * 7 + 1):
        h, w = rectangle(tokens, (6, 7))
        assert h >= 3 and w >= 4 and h * w <= tokens
        assert (h == 6 or (h + 1) * w > tokens) and (w == 7 or h * (w + 1) > tokens)


def test_refused():
    x = torch.randn(1, 12, 4)
    for remove in ((1,), (1, -1), (1.5, 1), (1, 2, 3)):
        with pytest.raises(ValueError, match=r"remove .*give numbers of rows and columns, or shares of them"):
            cubist(x, (3, 4), remove=remove)
    with pytest.raises(ValueError, match="value 'sum': choose entry, mean or token"):
        cubist(x, (3, 4), remove=(1, 1), value="sum")
    with pytest.raises(ValueError, match="tokens 3: one merge keeps at least 2×2 of 3×4 patches"):
        rectangle(3, (3, 4))
