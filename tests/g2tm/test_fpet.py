"""FPET: the checkerboard against loops over patches, its gradient against a dense form, ties, small grids."""

import pytest
import torch
from torch.nn.functional import normalize, one_hot

from g2tm import Grouping, fpet, fpet_training
from g2tm.fpet import StraightThrough
from g2tm.reduction import Chain

GRIDS = [(2, 2), (1, 5), (5, 1), (3, 4), (4, 3), (7, 6)]


def board(grid):
    """Patches that leave, row-major, and those that stay, in the order of the result."""
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    stay = [p for p in places if p[0] % 2 and not p[1] % 2] + [p for p in places if not p[0] % 2 and p[1] % 2]
    leave = [p for p in places if sum(p) % 2 == 0]
    return [[row * grid[1] + column for row, column in found] for found in (leave, stay)]


def test_it_merges_what_the_definition_merges():
    for grid in GRIDS:
        n_tokens, (leave, stay) = grid[0] * grid[1], board(grid)
        metric, x = torch.randn(2, 2, n_tokens, 5).double()
        sizes = torch.randint(1, 4, (2, n_tokens)).double()
        step, unit = fpet(metric, grid, sizes=sizes), normalize(metric, dim=-1)
        assert step.lengths == (n_tokens // 2,) * 2 and step.padding is None
        for image in range(2):
            group = {token: index for index, token in enumerate(stay)}
            for token in leave:
                group[token] = max(range(len(stay)), key=lambda k: float(unit[image, token] @ unit[image, stay[k]]))
            assert step.assignment[image].tolist() == [group[token] for token in range(n_tokens)]
            for index in range(len(stay)):
                own = [token for token in range(n_tokens) if group[token] == index]
                weights = sizes[image, own, None]
                torch.testing.assert_close(
                    step.merge(x)[image, index], (x[image, own] * weights).sum(0) / weights.sum()
                )


def test_of_equally_similar_patches_the_first_takes_it():
    step = fpet_training(torch.ones(1, 9, 4), (3, 3))
    assert step.assignment.tolist() == [[0, 2, 0, 0, 0, 1, 0, 3, 0]]
    assert torch.equal(step.sizes, torch.tensor([[6.0, 1, 1, 1]]))


def test_the_training_form_has_the_gradient_of_the_soft_matching():
    grid, sizes = (3, 4), torch.rand(2, 12).double() + 1
    metric, x, cotangent = torch.randn(2, 12, 5).double(), torch.randn(2, 12, 3).double(), torch.randn(2, 6, 3).double()
    metric.requires_grad_()
    leave, stay = board(grid)
    step, plain = fpet_training(metric, grid, sizes=sizes), fpet(metric, grid, sizes=sizes)
    assert torch.equal(step.assignment, plain.assignment) and torch.equal(step.sizes, plain.sizes)
    torch.testing.assert_close(step.merge(x), plain.merge(x))
    (found,) = torch.autograd.grad((step.merge(x) * cotangent).sum(), metric)

    unit = normalize(metric, dim=-1)
    cos = unit[:, leave] @ unit[:, stay].mT
    first, second = cos.sort(dim=2, descending=True).values[..., :2].unbind(2)
    soft = torch.sigmoid(cos - ((first + second) / 2).unsqueeze(2))
    matching = one_hot(cos.argmax(2), len(stay)) + soft - soft.detach()
    own, given = sizes[:, stay, None], sizes[:, leave, None]
    merged = (own * x[:, stay] + matching.mT @ (given * x[:, leave])) / (own + matching.mT @ given)
    (expected,) = torch.autograd.grad((merged * cotangent).sum(), metric)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert found.abs().sum() > 0


def test_the_training_form_is_a_reduction_like_any_other():
    metric, x = torch.randn(2, 16, 5, requires_grad=True), torch.randn(2, 16, 3)
    step = fpet_training(metric, (4, 4))
    assert isinstance(step, StraightThrough) and step.width == 8 and step.padding is None
    assert torch.equal(
        step.unmerge(step.merge(x)), step.merge(x).gather(1, step.assignment[..., None].expand(2, 16, 3))
    )
    total = step.then(Grouping.of_length(torch.zeros(2, 8, dtype=torch.long), 1))
    assert isinstance(total, Chain) and torch.equal(total.assignment, torch.zeros(2, 16, dtype=torch.long))
    assert not step.detached().merge(x).requires_grad and step.merge(x).requires_grad


def test_small_grids_and_no_images():
    for form in (fpet, fpet_training):
        for n_images, grid, left in ((2, (1, 1), 1), (2, (1, 2), 1), (2, (3, 1), 1), (0, (2, 3), 6)):
            n_tokens = grid[0] * grid[1]
            step, x = form(torch.randn(n_images, n_tokens, 4), grid), torch.randn(n_images, n_tokens, 3)
            assert step.merge(x).shape == (n_images, left, 3) and step.unmerge(step.merge(x)).shape == x.shape


def test_a_grid_that_does_not_hold_the_tokens_is_refused():
    for form in (fpet, fpet_training):
        with pytest.raises(ValueError, match="a grid of 2×3 patches does not hold 7 tokens"):
            form(torch.randn(1, 7, 4), (2, 3))
