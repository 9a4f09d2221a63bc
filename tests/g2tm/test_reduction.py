"""Properties of `Reduction`."""

import pytest
import torch

from g2tm import Reduction


def random_reduction(n_images, n_tokens, n_groups, sizes=None):
    """Every group has at least one token; the first image uses all groups, the others fewer."""
    counts = torch.tensor([n_groups - image % n_groups for image in range(n_images)])
    rows = []
    for count in counts.tolist():
        free = torch.randint(count, (n_tokens - count,))
        rows.append(torch.cat([torch.arange(count), free])[torch.randperm(n_tokens)])
    return Reduction(torch.stack(rows), counts, counts.tolist(), sizes)


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
    merged = Reduction(torch.zeros(1, 4096, dtype=torch.long), torch.tensor([1]), [1]).merge(x)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, torch.ones_like(merged))


def test_gradients_reach_every_token():
    reduction = random_reduction(2, 9, 4, torch.randint(1, 4, (2, 9)))
    x = torch.randn(2, 9, 3, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: reduction.unmerge(reduction.merge(x)), x)
    reduction.merge(x).sum().backward()
    assert (x.grad != 0).all()
