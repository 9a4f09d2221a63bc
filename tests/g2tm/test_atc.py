"""ATC against joins one by one: linkages, ties, sizes, padding, few tokens."""

import pytest
import torch
from torch.nn.functional import normalize

from g2tm import LINKAGES, atc
from tests.g2tm.padding import check_padding

BETWEEN = {"average": torch.mean, "complete": torch.max, "single": torch.min}


def reference(metric, clusters, linkage):
    """metric: (N, D) -> sorted clusters, in the order of their first token."""
    unit = normalize(metric, dim=-1)
    distance, groups = 1 - unit @ unit.T, [[token] for token in range(len(metric))]
    while len(groups) > clusters:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i)]
        i, j = min(pairs, key=lambda pair: float(BETWEEN[linkage](distance[groups[pair[0]]][:, groups[pair[1]]])))
        groups[j] += groups.pop(i)
    return sorted(map(sorted, groups))


def test_it_joins_the_nearest_clusters():
    for linkage in LINKAGES:
        for n_tokens, clusters in ((2, 1), (3, 2), (9, 4), (15, 1), (15, 14), (15, 6)):
            metric, x = torch.randn(2, 2, n_tokens, 5).double()
            sizes = torch.randint(1, 5, (2, n_tokens)).double()
            step = atc(metric, clusters=clusters, linkage=linkage, sizes=sizes)
            assert step.lengths == (clusters,) * 2
            for image in range(2):
                for index, group in enumerate(reference(metric[image], clusters, linkage)):
                    assert (step.assignment[image] == index).nonzero().flatten().tolist() == group
                    weights = sizes[image, group, None]
                    mean = (x[image, group] * weights).sum(0) / weights.sum()
                    torch.testing.assert_close(step.merge(x)[image, index], mean)
                    assert step.sizes[image, index] == weights.sum()


def test_equal_tokens_leave_exactly_so_many_clusters():
    for clusters in range(1, 9):
        assert atc(torch.ones(1, 8, 3), clusters=clusters).assignment.unique().tolist() == list(range(clusters))


def test_tokens_that_are_not_finite_are_far_from_all():
    metric = torch.randn(1, 10, 4).abs()
    metric[0, 3] = float("nan")
    assert (atc(metric, clusters=2).assignment == atc(metric, clusters=2).assignment[0, 3]).sum() == 1


def test_padding_makes_no_difference():
    tensors = {name: torch.randn(4, 11, 5) for name in ("metric", "x")} | {"sizes": torch.rand(4, 11) + 1}
    step = check_padding(lambda metric, **given: atc(metric, clusters=5, **given), (11, 6, 3, 0), **tensors)
    assert step.lengths == (5, 5, 3, 0)


def test_few_tokens_and_no_images():
    for n_images, n_tokens, clusters, left in ((2, 0, 1, 0), (2, 1, 1, 1), (2, 2, 1, 1), (2, 3, 9, 3), (0, 5, 2, 5)):
        step, x = atc(torch.randn(n_images, n_tokens, 4), clusters=clusters), torch.randn(n_images, n_tokens, 3)
        assert step.merge(x).shape == (n_images, left, 3) and step.unmerge(step.merge(x)).shape == x.shape


def test_wrong_values_are_refused():
    for given in ({"clusters": 0}, {"clusters": 1.5}, {"clusters": 2, "linkage": "ward"}):
        with pytest.raises(ValueError, match=r"can leave 1 to 8|choose average"):
            atc(torch.randn(1, 8, 3), **given)
