"""PiToMe: energies, both variants against loops over tokens, ties, padding, few tokens."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from g2tm import energy_margin, matches_all, pitome
from tests.g2tm.padding import check_padding

VARIANTS = ("bsm", "energy")


def reference(metric, r, margin, variant, paper=False):
    """metric: (N, D) -> groups of positions in the order of the result, the destination of a group last."""
    unit = normalize(metric, dim=-1)
    similarity = (unit @ unit.T).tolist()
    n, r = len(unit), min(r, len(unit) // 2)
    if r == 0:
        return [[token] for token in range(n)]

    def kernel(c):
        if c > margin:
            return c if paper else c - margin
        return math.exp(c - margin) - 1

    energy = [sum(map(kernel, row)) / n for row in similarity]
    order = sorted(range(n), key=lambda token: -energy[token])
    if variant == "energy":
        even, odd, stay = order[: 2 * r : 2], order[1 : 2 * r : 2], order[2 * r :]
    else:
        even, odd = order[::2], order[1::2]
    best = {token: max(odd, key=lambda other, token=token: similarity[token][other]) for token in even}
    if variant == "bsm":
        even.sort(key=lambda token: -similarity[token][best[token]])
        even, stay = even[:r], even[r:]
    return [[token] for token in stay] + [[token for token in even if best[token] == other] + [other] for other in odd]


def check(step, groups, x, sizes):
    """The step makes these groups, in this order, and their means by size."""
    for index, group in enumerate(groups):
        assert (step.assignment[0] == index).nonzero().flatten().tolist() == sorted(group)
        mean = (x[0, group] * sizes[0, group, None]).sum(0) / sizes[0, group].sum()
        torch.testing.assert_close(step.merge(x)[0, index], mean)
    torch.testing.assert_close(step.sizes[0], torch.stack([sizes[0, group].sum() for group in groups]).float())
    assert step.lengths == (len(groups),)


def test_it_merges_what_the_definition_merges():
    for n_tokens in (2, 3, 4, 7, 12, 25):
        for r in (1, 3, 100):
            for variant in VARIANTS:
                for margin, paper in ((0.5, False), (-0.2, False), (0.4, True)):
                    metric, x = torch.randn(2, 1, n_tokens, 6).double()
                    sizes = torch.randint(1, 5, (1, n_tokens)).double()
                    step = pitome(metric, r=r, margin=margin, variant=variant, sizes=sizes, paper=paper)
                    check(step, reference(metric[0], r, margin, variant, paper), x, sizes)


def test_of_equal_tokens_the_first_come_first():
    metric = torch.ones(2, 9, 4)
    energy = pitome(metric, r=2, margin=0.5)
    assert energy.assignment.tolist() == [[5, 5, 5, 6, 0, 1, 2, 3, 4]] * 2
    bsm = pitome(metric, r=2, margin=0.5, variant="bsm")
    assert bsm.assignment.tolist() == [[3, 3, 3, 4, 0, 5, 1, 6, 2]] * 2


def test_padding_makes_no_difference():
    tensors = {name: torch.randn(4, 11, 5) for name in ("metric", "x")} | {"sizes": torch.rand(4, 11) + 1}
    for variant in VARIANTS:

        def merge(metric, variant=variant, **given):
            return pitome(metric, r=4, margin=0.3, variant=variant, **given)

        assert check_padding(merge, (11, 6, 1, 0), **tensors).lengths == (7, 3, 1, 0)
    none = torch.zeros(4, 11, dtype=torch.bool)
    step, plain = (pitome(tensors["metric"], r=4, margin=0.3, padding=padding) for padding in (none, None))
    assert torch.equal(step.assignment, plain.assignment) and step.lengths == plain.lengths


def test_few_tokens_and_no_images():
    for variant in VARIANTS:
        for n_images, n_tokens, left in ((2, 0, 0), (2, 1, 1), (2, 2, 1), (2, 3, 2), (0, 5, 5)):
            step = pitome(torch.randn(n_images, n_tokens, 4), r=7, margin=0.5, variant=variant)
            x = torch.randn(n_images, n_tokens, 3)
            assert step.merge(x).shape == (n_images, left, 3) and step.unmerge(step.merge(x)).shape == x.shape
            assert step.padding is None


def test_margins_and_variants_follow_the_layers():
    assert [energy_margin(layer, 4) for layer in (1, 2, 3, 4)] == pytest.approx([0.75, 0.5625, 0.375, 0.1875])
    assert energy_margin(1, 12, paper=True) == 0.9 and energy_margin(7, 12, paper=True) == pytest.approx(0.45)
    assert [layer for layer in range(1, 6) if matches_all(layer, 5)] == [1, 2, 3]


def test_wrong_values_are_refused():
    for given in ({"r": -1}, {"r": 1.5}, {"r": 2, "variant": "paper"}):
        with pytest.raises(ValueError, match=r"number of tokens|choose bsm or energy"):
            pitome(torch.randn(1, 8, 3), margin=0.5, **given)
