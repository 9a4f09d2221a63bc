"""DiffRate against loops over tokens: sorting, pruning, merging, tying, padding, the training form, operations."""

import pytest
import torch
from torch.nn.functional import normalize

from g2tm import diffrate, diffrate_training, gigaflops, kept_tokens, rate_mask
from g2tm.attention import SMALLEST_SIZE
from tests.g2tm.padding import check_padding

COUNTS = ((9, 9), (9, 5), (6, 6), (6, 3), (1, 1), (100, 4), (5, 100), (2, 1))


def reference(x, importance, kept, merged, sizes):
    """(N, ...) each -> (assignment, values, sizes) of the result."""
    n = len(x)
    order = sorted(range(n), key=lambda token: -float(importance[token]))
    kept, merged = min(kept, n), min(kept, merged, n)
    unit = normalize(x, dim=-1)
    groups = {token: [token] for token in order[:merged]}
    total = {token: float(sizes[token]) for token in groups}
    for token in order[merged:kept]:
        target = max(order[:merged], key=lambda other: float(unit[token] @ unit[other]))
        groups[target].append(token)
        total[target] += float(unit[token] @ unit[target]) * float(sizes[token])
    values = torch.stack([x[groups[token]].mean(0) for token in order[:merged]])
    assignment = {token: index for index, target in enumerate(order[:merged]) for token in groups[target]}
    for token in order[kept:]:
        similar = normalize(values, dim=-1) @ unit[token]
        assignment[token] = int(similar.argmax())
    floored = [max(total[token], SMALLEST_SIZE) for token in order[:merged]]
    return [assignment[token] for token in range(n)], values, torch.tensor(floored)


def test_it_prunes_and_merges_what_the_definition_says():
    for n_tokens in (2, 3, 9, 16):
        for kept, merged in COUNTS:
            x, importance = torch.randn(1, n_tokens, 4).double(), torch.rand(1, n_tokens)
            sizes = torch.randint(1, 5, (1, n_tokens)).float()
            step = diffrate(x, importance=importance, kept=kept, merged=merged, sizes=sizes)
            assignment, values, total = reference(x[0], importance[0], kept, merged, sizes[0])
            assert step.assignment[0].tolist() == assignment, (n_tokens, kept, merged)
            torch.testing.assert_close(step.merge(x)[0], values)
            torch.testing.assert_close(step.sizes[0], total, atol=1e-5, rtol=1e-5)
            assert step.lengths == (len(values),) and step.padding is None


def test_of_equal_tokens_the_first_come_first():
    step = diffrate(torch.ones(1, 6, 3), importance=torch.ones(1, 6), kept=4, merged=2)
    assert step.assignment.tolist() == [[0, 1, 0, 0, 0, 0]] and step.sizes.tolist() == [[3, 1]]


def test_padding_makes_no_difference():
    tensors = {name: torch.rand(4, 11) + 0.1 for name in ("importance", "sizes")}
    x = torch.randn(4, 11, 5)

    def merge(y, **given):
        return diffrate(y, kept=6, merged=4, **given)

    assert check_padding(merge, (11, 6, 1, 0), x=x, y=x, **tensors).lengths == (4, 4, 1, 0)


def test_few_tokens_and_no_images():
    for n_images, n_tokens, left in ((2, 0, 0), (2, 1, 1), (2, 2, 2), (2, 3, 2), (0, 5, 5)):
        x = torch.randn(n_images, n_tokens, 4)
        step = diffrate(x, importance=torch.rand(n_images, n_tokens), kept=3, merged=2)
        assert step.merge(x).shape == (n_images, left, 4) and step.unmerge(step.merge(x)).shape == x.shape


def test_counts_that_leave_nothing_are_refused():
    for kept, merged in ((0, 0), (0, 3), (3, 0), (-2, 1)):
        with pytest.raises(ValueError, match="keep at least one"):
            diffrate(torch.randn(1, 8, 3), importance=torch.ones(1, 8), kept=kept, merged=merged)


def rates(n_tokens, prune, merge):
    """Logits, with gradients, and candidates of rates that keep about so many tokens."""
    candidates = torch.arange(n_tokens, 0, -1.0)
    return {
        name: ((-(candidates - goal).abs()).requires_grad_(), candidates)
        for name, goal in (("prune", prune), ("merge", merge))
    }


def test_the_training_form_keeps_what_inference_keeps():
    """Of the tokens that are alive, in the same order; the others stay behind the mask."""
    for n_tokens, prune, merge in ((12, 9, 5), (12, 12, 6), (12, 7, 12), (3, 2, 1), (1, 1, 1)):
        x, importance = torch.randn(2, n_tokens, 4), torch.rand(2, n_tokens)
        given = rates(n_tokens, prune, merge)
        kept, merged = (int(kept_tokens(*given[name])) for name in ("prune", "merge"))
        left = min(kept, merged)
        soft = diffrate_training(x, importance=importance, **given)
        hard = diffrate(x, importance=importance, kept=kept, merged=merged)
        assert soft.lengths == (n_tokens,) * 2 and soft.mask.tolist() == [[1.0] * left + [0.0] * (n_tokens - left)] * 2
        torch.testing.assert_close(soft.merge(x)[:, :left], hard.merge(x))
        assert torch.equal(soft.assignment, hard.assignment)
        if left < n_tokens:
            logits = [given[name][0] for name in given]
            gradients = torch.autograd.grad(soft.mask.cumsum(1).sum(), logits, allow_unused=True)
            assert any(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)


def test_a_second_step_looks_at_the_tokens_that_are_alive():
    x, importance, mask = torch.randn(2, 8, 4), torch.rand(2, 8), torch.ones(2, 8)
    mask[0, 2:5] = mask[1, :3] = 0
    importance = importance * mask - (1 - mask)  # as masked attention makes it
    given = rates(8, 4, 3)
    left = min(int(kept_tokens(*rate)) for rate in given.values())
    step = diffrate_training(x, importance=importance, mask=mask, **given)
    assert step.mask.sum(1).tolist() == [left, left] and (step.mask[:, 5:] == 0).all()
    torch.testing.assert_close(
        step.merge(x)[:, 5:].abs().sum((1, 2)), (x.abs().sum(2) * (1 - mask)).sum(1)
    )  # unchanged


def test_the_training_form_of_no_images():
    for mask in (None, torch.ones(0, 8)):
        x = torch.randn(0, 8, 4)
        step = diffrate_training(x, importance=torch.rand(0, 8), mask=mask, **rates(8, 4, 3))
        assert step.merge(x).shape == step.unmerge(x).shape == (0, 8, 4)


def test_the_mask_of_a_rate_has_the_gradient_of_its_probabilities():
    logits, candidates = torch.randn(4, dtype=torch.double, requires_grad=True), torch.tensor([8.0, 6, 4, 2])
    mask, cotangent = rate_mask(logits, candidates, 5, 7, 8), torch.randn(8).double()
    assert mask.tolist() == [1, 1, 1, 1, 1, 0, 0, 1]
    (found,) = torch.autograd.grad((mask * cotangent).sum(), logits)
    share = logits.softmax(0)
    stays = torch.stack([sum(share[k] for k in range(4) if candidates[k] > position) for position in range(8)])
    torch.testing.assert_close(found, torch.autograd.grad((stays * cotangent).sum(), logits)[0])
    kept = kept_tokens(logits, candidates)
    expected = (candidates * logits.softmax(0)).sum()
    assert kept == expected.ceil()
    torch.testing.assert_close(torch.autograd.grad(kept, logits), torch.autograd.grad(expected, logits))


def test_operations_are_counted_by_the_formula():
    prune, merge = torch.tensor([15.0, 9], requires_grad=True), torch.tensor([12.0, 11], requires_grad=True)
    found = gigaflops(list(prune), list(merge), length=17, width=6, patch_size=4, classes=3)
    block = lambda n, left: 4 * n * 36 + 2 * n**2 * 6 + 8 * left * 36  # noqa: E731
    assert float(found.detach()) * 1e9 == pytest.approx(17 * 6 * 48 + 6 * 3 + block(17, 12) + block(12, 9), rel=1e-6)
    gradients = torch.autograd.grad(found, (prune, merge))
    assert torch.equal(*gradients)  # both rates get all of it
    assert float(gradients[0][1]) * 1e9 == pytest.approx(8 * 36, rel=1e-5)
    assert float(gradients[0][0]) * 1e9 == pytest.approx(8 * 36 + 4 * 36 + 4 * 12 * 6, rel=1e-5)
    assert gigaflops([5], [5], length=5, width=2).dtype == torch.float32
