"""LTMP against loops over the whole sequence: parity, thresholds, budgets, ties, padding, images without tokens."""

import math

import pytest
import torch
from torch.nn.functional import normalize

from g2tm import ltmp, ltmp_training, operations_left
from tests.g2tm.oracle import pad
from tests.helpers import Reads, Waits


def inputs(n_images, n_tokens):
    """x, keys, importance and sizes; keys are close to each other, so that thresholds above 0 tell them apart."""
    keys = torch.randn(n_images, n_tokens, 4).double() + torch.tensor([1.0, 0.5, 0, 0])
    importance, sizes = torch.rand(n_images, n_tokens) / n_tokens, torch.randint(1, 5, (n_images, n_tokens)).float()
    return torch.randn(n_images, n_tokens, 3).double(), keys, {"importance": importance, "sizes": sizes}


def reference(x, keys, importance, sizes, merge_threshold, prune_threshold, fewest, prefix, tokens=None):
    """(N, ...) each; `prefix` tokens stand in front -> (assignment, values, sizes) of the patches that are left."""
    n, unit = len(x), normalize(keys, dim=-1)
    a, b = ([token for token in range(n) if (prefix + token) % 2 == parity] for parity in (0, 1))
    groups, partner = {token: [token] for token in range(n)}, {}
    if b:
        partner = {i: max(b, key=lambda j: float(unit[i] @ unit[j])) for i in a}
    similarity = {i: min(float(unit[i] @ unit[j]), 1.0) for i, j in partner.items()}
    moving = [i for i in sorted(partner, key=lambda i: -similarity[i]) if similarity[i] > merge_threshold]
    for i in moving if tokens is None else moving[: max(n - tokens, 0)]:
        groups[partner[i]] += groups.pop(i)
    order = [i for i in a if i in groups] + b
    values = {i: (x[groups[i]] * sizes[groups[i], None]).sum(0) / sizes[groups[i]].sum() for i in order}
    weight = {i: max(float(importance[token]) for token in groups[i]) for i in order}
    by_weight = sorted(order, key=lambda i: -weight[i])
    count = sum(weight[i] > prune_threshold for i in order) if tokens is None else tokens
    stay = [i for i in order if i in by_weight[: max(count, fewest)]]
    assignment = {token: stay.index(i) for i in stay for token in groups[i]}
    for i in order:
        if i not in stay:
            nearest = [float(normalize(values[i], dim=-1) @ normalize(values[j], dim=-1)) for j in stay]
            for token in groups[i]:
                assignment[token] = nearest.index(max(nearest)) if stay else 0
    return (
        [assignment[token] for token in range(n)],
        torch.stack([values[i] for i in stay]) if stay else x[:0],
        torch.tensor([float(sizes[groups[i]].sum()) for i in stay]),
    )


def check(step, image, expected, x):
    assignment, values, sizes = expected
    n_tokens = len(assignment)
    assert step.assignment[image, :n_tokens].tolist() == assignment
    assert step.lengths[image] == len(values) == step.counts[image]
    torch.testing.assert_close(step.merge(x)[image, : len(values)], values, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(step.sizes[image, : len(values)], sizes)
    assert (step.sizes[image, len(values) :] == 0).all() and (step.merge(x)[image, len(values) :] == 0).all()


@pytest.mark.slow
def test_it_merges_and_prunes_what_the_definition_says():
    for prefix in (0, 1, 2, 5):
        for n_tokens in (1, 2, 3, 4, 11):
            for merge_threshold, share in ((0.6, 0.5), (1.0, 0.6), (0.0, 0.0), (0.4, 1.0)):
                for fewest in (0, 1, 3):
                    x, keys, given = inputs(3, n_tokens)
                    rule = {"merge_threshold": merge_threshold, "prune_threshold": share / n_tokens}
                    step = ltmp(x, keys, fewest=fewest, odd_first=prefix % 2 == 1, **rule, **given)
                    for image in range(3):
                        own = {name: value[image] for name, value in given.items()}
                        check(
                            step,
                            image,
                            reference(x[image], keys[image], fewest=fewest, prefix=prefix, **own, **rule),
                            x,
                        )
                    as_tensors = {name: torch.tensor([value]) for name, value in rule.items()}
                    learned = ltmp(x, keys, fewest=fewest, odd_first=prefix % 2 == 1, **as_tensors, **given)
                    assert torch.equal(learned.assignment, step.assignment)


def test_a_budget_is_met_exactly():
    for prefix in (0, 1):
        for n_tokens, tokens in ((1, 1), (2, 1), (11, 4), (11, 11), (11, 10), (5, 9)):
            x, keys, given = inputs(3, n_tokens)
            rule = {"merge_threshold": 0.6, "prune_threshold": 0.01, "tokens": tokens}
            step = ltmp(x, keys, odd_first=prefix == 1, **rule, **given)
            assert step.lengths == (min(tokens, n_tokens),) * 3 and step.padding is None
            for image in range(3):
                own = {name: value[image] for name, value in given.items()} | rule
                check(step, image, reference(x[image], keys[image], fewest=1, prefix=prefix, **own), x)


def test_of_equal_tokens_the_first_come_first():
    x = torch.ones(1, 6, 3)
    rule = {"importance": torch.ones(1, 6), "merge_threshold": 1.0, "prune_threshold": 0.0, "tokens": 2}
    for odd_first, expected in ((True, [[0, 0, 0, 0, 0, 0]]), (False, [[0, 0, 0, 0, 0, 0]])):
        step = ltmp(x, x, odd_first=odd_first, **rule)  # none merges: the first two of the new order stay
        assert step.lengths == (2,)
        first = [1, 3] if odd_first else [0, 2]  # even positions come first
        expected[0][first[1]] = 1
        assert step.assignment.tolist() == expected


def test_padding_makes_no_difference():
    for odd_first in (False, True):
        x, keys, given = inputs(4, 11)
        lengths = (11, 6, 1, 2)
        padded, padding = pad(keys, lengths)
        noisy = {name: torch.where(padding, 1e3, value) for name, value in given.items()}
        rule = {"merge_threshold": 0.5, "prune_threshold": 0.04, "odd_first": odd_first}
        step = ltmp(torch.where(padding[..., None], 1e3, x), padded, padding=padding, **noisy, **rule)
        for image, length in enumerate(lengths):
            own = {name: value[image : image + 1, :length] for name, value in given.items()}
            alone = ltmp(x[image : image + 1, :length], keys[image : image + 1, :length], **own, **rule)
            assert step.lengths[image] == alone.width
            assert torch.equal(step.assignment[image, :length], alone.assignment[0])
            torch.testing.assert_close(step.sizes[image, : alone.width], alone.sizes[0])
            merged = step.merge(torch.where(padding[..., None], 1e3, x))
            torch.testing.assert_close(merged[image, : alone.width], alone.merge(x[image : image + 1, :length])[0])
        uniform = ltmp(x, padded, padding=padding, batch="uniform", **noisy, **rule)
        assert all(left <= length for left, length in zip(uniform.lengths, lengths, strict=True))
        assert torch.equal(uniform.counts, torch.tensor(uniform.lengths))
        with pytest.raises(ValueError, match="padding"):
            ltmp(x, padded, padding=padding, tokens=3, **noisy, **rule)


def test_uniform_keeps_as_many_as_the_image_that_keeps_most():
    x, keys, given = inputs(3, 12)
    given["importance"] *= torch.tensor([[1.0], [1.5], [3.0]])
    rule = {"merge_threshold": 0.5, "prune_threshold": 0.04}
    step = ltmp(x, keys, batch="uniform", **rule, **given)
    assert len(set(step.lengths)) == 1 and step.padding is None
    ragged = ltmp(x, keys, **rule, **given)
    assert len(set(ragged.lengths)) > 1 and step.lengths[0] >= max(ragged.lengths)


def test_an_image_may_lose_all_its_tokens():
    x, keys, given = inputs(2, 6)
    given["importance"][0] = 0
    rule = {"merge_threshold": 1.0, "prune_threshold": 0.0, "fewest": 0}
    step = ltmp(x, keys, **rule, **given)
    assert step.lengths == (0, 6) and (step.assignment[0] == 0).all() and step.padding[0].all()
    given["importance"][1] = 0
    step = ltmp(x, keys, **rule, **given)
    assert step.lengths == (0, 0) and step.width == 1 and step.padding.all()
    assert (step.unmerge(step.merge(x)) == 0).all() and step.sizes.tolist() == [[0], [0]]
    kept = ltmp(x, keys, **rule | {"fewest": 1}, **given)
    assert kept.lengths == (1, 1) and kept.padding is None


def test_few_tokens_and_no_images():
    for tokens in (None, 2):
        for n_images, n_tokens in ((2, 0), (0, 5), (0, 0)):
            x, keys, given = inputs(n_images, n_tokens)
            step = ltmp(x, keys, merge_threshold=0.5, prune_threshold=0.0, tokens=tokens, **given)
            assert step.merge(x).shape == x.shape == step.unmerge(x).shape


def test_it_waits_once_and_for_a_budget_not_at_all():
    x, keys, given = inputs(3, 12)
    for tokens, expected in ((None, 1), (5, 0)):
        with Waits() as waits, Reads() as reads:
            step = ltmp(x, keys, merge_threshold=0.5, prune_threshold=0.02, tokens=tokens, **given)
            step.unmerge(step.merge(x))
        assert (reads.count, waits.count) == (expected, 0)


def test_wrong_values_are_refused():
    x, keys, given = inputs(1, 6)
    rule = {"merge_threshold": 0.5, "prune_threshold": 0.1}
    for wrong, message in (
        ({"merge_threshold": 1.5}, "merge_threshold 1.5: give a number from 0 to 1"),
        ({"prune_threshold": -0.1}, "prune_threshold -0.1: give a number from 0 to 1"),
        ({"batch": "equal"}, "choose ragged or uniform"),
        ({"tokens": 0}, "can leave 1 to 6"),
    ):
        with pytest.raises(ValueError, match=message):
            ltmp(x, keys, **rule | wrong, **given)


def training(x, keys, given, merge_threshold, prune_threshold, **more):
    thresholds = [torch.tensor([value], requires_grad=True) for value in (merge_threshold, prune_threshold)]
    step = ltmp_training(x, keys, merge_threshold=thresholds[0], prune_threshold=thresholds[1], **given, **more)
    return step, thresholds


def test_the_training_form_keeps_what_inference_keeps():
    for odd_first in (False, True):
        for n_tokens in (1, 2, 3, 12):
            x, keys, given = inputs(2, n_tokens)
            rule = {"merge_threshold": 0.6, "prune_threshold": 0.4 / n_tokens}
            step, thresholds = training(x, keys, given, *rule.values(), odd_first=odd_first)
            hard = ltmp(x, keys, fewest=0, odd_first=odd_first, **rule, **given)
            assert step.lengths == (n_tokens,) * 2 and step.mask.sum(1).tolist() == list(hard.lengths)
            for image, length in enumerate(hard.lengths):
                alive = step.mask[image] > 0.5
                torch.testing.assert_close(step.merge(x)[image, alive], hard.merge(x)[image, :length])
                torch.testing.assert_close(step.sizes[image, alive], hard.sizes[image, :length])
                if length:
                    order = (alive.cumsum(0) - 1)[step.assignment[image]]
                    assert torch.equal(order, hard.assignment[image])
            gradients = torch.autograd.grad(step.mask.sum(), thresholds, allow_unused=True)
            assert gradients[1].abs() > 0 and (n_tokens < 12 or gradients[0].abs() > 0)


def test_tokens_that_are_gone_do_not_come_back():
    x, keys, given = inputs(2, 12)
    mask = torch.ones(2, 12)
    mask[:, [1, 4, 7]] = 0
    for odd_first in (False, True):
        step, _ = training(x, keys, given, 0.6, 0.03, mask=mask, odd_first=odd_first)
        even, odd = (range(first, 12, 2) for first in ((1, 0) if odd_first else (0, 1)))
        order = [*even, *odd]
        assert all((step.mask[:, order.index(token)] == 0).all() for token in (1, 4, 7))
        torch.testing.assert_close(step.merge(x)[:, order.index(1)], x[:, 1])


def test_the_training_form_of_no_images():
    x, keys, given = inputs(0, 5)
    assert training(x, keys, given, 0.5, 0.1)[0].merge(x).shape == x.shape


def test_operations_are_counted_by_the_formula():
    lengths = [17.0, torch.tensor(12.5, requires_grad=True), torch.tensor(9.0, requires_grad=True)]
    found = operations_left(lengths, 6)
    block = lambda before, after: 2 * before * 36 + before**2 * 6 + 4 * after * 36  # noqa: E731
    expected = (block(17, 12.5) + block(12.5, 9)) / 2 / (6 * 17 * 36 + 17**2 * 6)
    assert float(found.detach()) == pytest.approx(expected) and found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found, lengths[2:])
    assert float(gradient) == pytest.approx(4 * 36 / 2 / (6 * 17 * 36 + 17**2 * 6))
    assert float(operations_left([5.0, 5.0], 3)) == 1 and math.isfinite(float(operations_left([5, 5, 5], 3)))
