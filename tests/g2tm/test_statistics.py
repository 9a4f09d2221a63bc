"""Moments of pairwise similarities."""

import pytest
import torch

from g2tm import class_similarity_moments, mean_and_std, similarity_moments


def test_moments_are_those_of_all_pairs_pooled_over_images():
    batches = [torch.randn(2, 9, 4), torch.randn(1, 13, 4) + 1]
    total = sum(similarity_moments(x) for x in batches)
    pairs = []
    for x in batches:
        for image in torch.nn.functional.normalize(x.double(), dim=-1):
            i, j = torch.triu_indices(len(image), len(image), 1)
            pairs.append((image @ image.T)[i, j])
    pairs = torch.cat(pairs)
    mean, std = mean_and_std(total)
    assert total[0] == len(pairs)
    assert mean == pytest.approx(pairs.mean().item(), abs=1e-12)
    assert std == pytest.approx(pairs.std(correction=0).item(), abs=1e-12)


def test_equal_tokens_have_no_spread():
    mean, std = mean_and_std(similarity_moments(torch.ones(1, 50, 3)))
    assert mean == pytest.approx(1) and std == pytest.approx(0, abs=1e-6)


def test_no_pair_has_no_mean():
    for shape in ((0, 9, 4), (3, 1, 4)):
        with pytest.raises(ValueError, match="no pair"):
            mean_and_std(similarity_moments(torch.randn(shape)))


def test_moments_by_class_are_those_of_the_pairs_in_a_window():
    """Against every pair of every image, of grids that windows do not divide; a label below 0 is left out."""
    grid, x = (3, 5), torch.randn(2, 15, 4)
    labels = torch.randint(-1, 3, (2, 15))
    row, column = torch.arange(15) // 5, torch.arange(15) % 5
    for window in ((2, 2), (2, 3), (8, 8), None):
        expected = torch.zeros(2, 2, dtype=torch.float64)
        height, width = window or grid
        for image, own in zip(torch.nn.functional.normalize(x.double(), dim=-1), labels, strict=True):
            for i, j in torch.triu_indices(15, 15, 1).T.tolist():
                near = row[i] // height == row[j] // height and column[i] // width == column[j] // width
                if near and own[i] >= 0 and own[j] >= 0:
                    expected[int(own[i] != own[j])] += torch.tensor([1.0, float(image[i] @ image[j])])
        torch.testing.assert_close(class_similarity_moments(x, grid, labels, window), expected)
    assert (expected[:, 0] > 20).all()


def test_moments_by_class_of_nothing():
    x = torch.randn(1, 6, 4)
    assert not class_similarity_moments(x, (2, 3), torch.full((1, 6), -1)).any()
    with pytest.raises(ValueError, match="one per token"):
        class_similarity_moments(x, (2, 3), torch.zeros(1, 5, dtype=torch.long))
