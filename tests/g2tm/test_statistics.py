"""Moments of pairwise similarities."""

import pytest
import torch

from g2tm import mean_and_std, similarity_moments


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
