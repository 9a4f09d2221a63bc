"""Properties of reductions: by assignment, with weights apart from sizes, and chained."""

import pytest
import torch

from g2tm import Chain, Grouping, Reduction
from g2tm.reduction import equal_counts


def random_reduction(n_images, n_tokens, n_groups, sizes=None, weights=None):
    """Every group has at least one token; the first image uses all groups, the others fewer."""
    counts = torch.tensor([n_groups - image % n_groups for image in range(n_images)])
    rows = []
    for count in counts.tolist():
        free = torch.randint(count, (n_tokens - count,))
        rows.append(torch.cat([torch.arange(count), free])[torch.randperm(n_tokens)])
    return Grouping(torch.stack(rows), counts, counts.tolist(), sizes, weights)


@pytest.mark.parametrize("n_images", [1, 3])
def test_sizes_sum_to_the_number_of_patches(n_images):
    reduction = random_reduction(n_images, 20, 6)
    assert torch.equal(reduction.sizes.sum(1), torch.full((n_images,), 20.0))
    assert torch.equal((reduction.sizes > 0).sum(1), reduction.counts)


@pytest.mark.parametrize("n_images", [1, 3])
def test_unmerge_after_merge_is_the_group_mean(n_images):
    sizes = torch.randint(1, 5, (n_images, 20)).float()
    reduction, x = random_reduction(n_images, 20, 6, sizes), torch.randn(n_images, 20, 4)
    back = reduction.unmerge(reduction.merge(x))
    for image in range(n_images):
        for token in range(20):
            group = reduction.assignment[image] == reduction.assignment[image, token]
            weight = sizes[image, group, None]
            expected = (x[image, group] * weight).sum(0) / weight.sum()
            torch.testing.assert_close(back[image, token], expected)


def test_merging_the_merged_changes_nothing():
    reduction, y = random_reduction(2, 20, 6), torch.randn(2, 6, 4)
    y = y * (reduction.sizes > 0).unsqueeze(-1)
    torch.testing.assert_close(reduction.merge(reduction.unmerge(y)), y)


def test_composition_equals_the_two_steps():
    first = random_reduction(2, 30, 12)
    second = random_reduction(2, 12, 5, first.sizes)
    total, x = first.then(second), torch.randn(2, 30, 4)
    torch.testing.assert_close(total.sizes, second.sizes)
    torch.testing.assert_close(total.merge(x), second.merge(first.merge(x)))
    y = torch.randn(2, 5, 4)
    torch.testing.assert_close(total.unmerge(y), first.unmerge(second.unmerge(y)))


def test_composition_is_associative():
    first = random_reduction(1, 30, 12)
    second = random_reduction(1, 12, 8, first.sizes)
    third = random_reduction(1, 8, 3, second.sizes)
    left, right = first.then(second).then(third), first.then(second.then(third))
    assert torch.equal(left.assignment, right.assignment)
    torch.testing.assert_close(left.sizes, right.sizes)


def test_padding_is_marked_and_empty():
    reduction = random_reduction(2, 20, 6)
    merged = reduction.merge(torch.randn(2, 20, 4))
    assert torch.equal(reduction.padding, reduction.sizes == 0)
    assert not merged[reduction.padding].any()
    assert random_reduction(1, 20, 6).padding is None


def test_half_precision_is_summed_in_float32():
    x = torch.full((1, 4096, 2), 1.0, dtype=torch.bfloat16)  # a bfloat16 sum of ones stops at 256
    merged = Grouping.of_length(torch.zeros(1, 4096, dtype=torch.long), 1).merge(x)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, torch.ones_like(merged))


def test_gradients_reach_every_token():
    reduction = random_reduction(2, 9, 4, torch.randint(1, 4, (2, 9)))
    x = torch.randn(2, 9, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reduction.unmerge(reduction.merge(x)), x)
    reduction.merge(x).sum().backward()
    assert (x.grad != 0).all()


def test_weights_make_the_mean_and_sizes_stay():
    sizes, weights = torch.randint(1, 5, (2, 20)).float(), torch.rand(2, 20)
    plain, x = random_reduction(2, 20, 6, sizes), torch.randn(2, 20, 4)
    weighted = Grouping(plain.assignment, plain.counts, plain.lengths, sizes, weights)
    assert torch.equal(weighted.sizes, plain.sizes) and torch.equal(weighted.assignment, plain.assignment)
    same = Grouping(plain.assignment, plain.counts, plain.lengths, weights)
    torch.testing.assert_close(weighted.merge(x), same.merge(x))


def test_a_token_of_weight_0_is_carried_along():
    """Pruning: the group has the values of its other tokens, and its size counts all."""
    weights = torch.tensor([[1.0, 0, 0, 0]])
    kept = Grouping(torch.tensor([[0, 0, 1, 1]]), torch.tensor([2]), [2], weights=weights)
    x = torch.tensor([[[1.0], [5.0], [2.0], [3.0]]])
    assert kept.merge(x).flatten().tolist() == [1, 0] and kept.sizes.tolist() == [[2, 2]] and kept.padding is None
    assert kept.unmerge(kept.merge(x)).flatten().tolist() == [1, 1, 0, 0]


def test_composition_with_weights_equals_the_two_steps():
    for first_weights, second_weights in ((True, False), (False, True), (True, True)):
        first = random_reduction(2, 30, 12, weights=torch.rand(2, 30) if first_weights else None)
        weights = torch.rand(2, 12) * (first.sizes > 0) if second_weights else None  # padding counts nothing
        second = random_reduction(2, 12, 5, first.sizes, weights)
        total, x = first.then(second), torch.randn(2, 30, 4)
        torch.testing.assert_close(total.sizes, second.sizes)
        torch.testing.assert_close(total.merge(x), second.merge(first.merge(x)))


def test_a_chain_is_its_steps_one_after_the_other():
    first = random_reduction(2, 30, 12)
    second = random_reduction(2, 12, 5, first.sizes)
    chain, total, x = Chain(first, second), first.then(second), torch.randn(2, 30, 4)
    torch.testing.assert_close(chain.merge(x), total.merge(x))
    y = torch.randn(2, 5, 4)
    assert torch.equal(chain.unmerge(y), total.unmerge(y))
    assert torch.equal(chain.assignment, total.assignment) and chain.lengths == total.lengths
    assert all(isinstance(step, Reduction) for step in (chain, first))


def test_given_padding_need_not_come_last():
    padding = torch.tensor([[False, True, False], [True, False, False]])
    step = Grouping(torch.tensor([[0, 2, 2], [1, 2, 1]]), torch.tensor([2, 2]), [2, 2], width=3, padding=padding)
    assert step.padding is padding and step.sizes.tolist() == [[1, 0, 2], [0, 2, 1]] and step.width == 3
    wide = step.widened(5)
    assert wide.padding.tolist() == [[False, True, False, True, True], [True, False, False, True, True]]
    assert Grouping.identity(torch.randn(2, 3, 1)).then(step).padding is padding


def test_identity_keeps_padding():
    x, padding = torch.randn(2, 4, 3), torch.arange(4) >= torch.tensor([[3], [2]])
    step = Grouping.identity(x, padding=padding)
    assert step.lengths == (3, 2) and step.sizes.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert torch.equal(step.merge(x)[1, :2], x[1, :2]) and step.padding.tolist() == [[False] * 3, [False, False, True]]


class Scaled(Reduction):
    """A reduction with no more than it has to have: it keeps all tokens, times a number that it learns."""

    def __init__(self, factor, like, inner=None):
        self.factor, self.parts = factor, (factor, [inner, "name"])
        self.counts, self.lengths = equal_counts(like, like.shape[1])
        self.sizes = torch.ones(like.shape[:2])

    def merge(self, x):
        return x * self.factor

    def unmerge(self, y, scores=False):
        return y if scores else y / self.factor


def test_the_base_class_states_the_defaults():
    x, factor = torch.randn(2, 5, 3), torch.tensor(2.0)
    step = Scaled(factor, x)
    assert step.padding is None and step.width == 5 and step.lengths == (5, 5) and step.counts.tolist() == [5, 5]
    chain = step.then(step)
    assert isinstance(chain, Chain) and not hasattr(chain, "assignment") and chain.width == 5
    torch.testing.assert_close(chain.unmerge(chain.merge(x)), x)
    assert torch.equal(chain.unmerge(x, scores=True), x)
    assert Scaled(factor, x[:0]).width == 5
    with pytest.raises(TypeError, match="abstract"):
        Reduction()


def test_detached_copies_hold_no_graph():
    x, factor = torch.randn(2, 5, 3), torch.tensor(2.0, requires_grad=True) * 1
    weights = torch.rand(2, 5, requires_grad=True) * 1
    inner = Grouping(torch.zeros(2, 5, dtype=torch.long), torch.tensor([1, 1]), [1, 1], weights=weights)
    inner.merge(x)  # computes what is kept
    chain = Scaled(factor, x, inner).then(inner)
    found = chain.detached()
    assert type(found) is Chain and chain.merge(x).requires_grad and not found.merge(x).requires_grad
    torch.testing.assert_close(found.merge(x), chain.merge(x).detach())
    first = found.first
    assert not first.factor.requires_grad and not first.parts[0].requires_grad and first.parts[1][1] == "name"
    assert not first.parts[1][0].merge(x).requires_grad and inner.merge(x).requires_grad


def test_reductions_stay_in_one_graph():
    def function(x):
        step = Grouping.of_length(torch.arange(6, device=x.device).div(2, rounding_mode="floor").repeat(2, 1), 3)
        total = step.then(Grouping.identity(step.merge(x)))
        return total.unmerge(total.merge(x)), total.sizes, total.width

    x = torch.randn(2, 6, 3)
    found = torch.compile(function, fullgraph=True, backend="eager")(x)
    assert torch.equal(found[0], function(x)[0]) and torch.equal(found[1], torch.full((2, 3), 2.0)) and found[2] == 3


def test_identity_changes_nothing():
    for n_images in (0, 1, 3):
        x = torch.randn(n_images, 5, 4)
        reduction = Grouping.identity(x)
        assert torch.equal(reduction.merge(x), x) and torch.equal(reduction.unmerge(x), x)
        assert reduction.lengths == (5,) * n_images and reduction.padding is None


def test_widened_groups_have_padding_behind():
    reduction, x = random_reduction(2, 20, 6), torch.randn(2, 20, 4)
    wide = reduction.widened(9)
    torch.testing.assert_close(wide.merge(x)[:, :6], reduction.merge(x))
    assert wide.padding[:, 6:].all() and not wide.merge(x)[wide.padding].any()
