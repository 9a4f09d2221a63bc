"""DCT: SciPy's transform, the way back, composition."""

import pytest
import scipy.fft
import torch

from g2tm import bipartite, dct
from g2tm.dct import Truncation
from g2tm.reduction import Chain

CLOSE = {"atol": 1e-5, "rtol": 0}
LENGTHS = [(1, 1), (2, 1), (3, 2), (5, 1), (8, 4), (8, 7), (9, 5), (16, 1), (33, 32), (64, 48), (65, 33), (65, 65)]


def truncation(n_images, n_tokens, kept):
    return Truncation(torch.empty(n_images), n_tokens, kept)


def test_it_is_the_transform_of_scipy():
    for n_tokens, kept in LENGTHS:
        step, x = truncation(2, n_tokens, kept), torch.randn(2, n_tokens, 3, dtype=torch.double)
        frequencies = scipy.fft.dct(x.numpy(), axis=1, norm="ortho")[:, :kept]
        torch.testing.assert_close(step.merge(x), torch.from_numpy(scipy.fft.idct(frequencies, axis=1, norm="ortho")))
        y = torch.randn(2, kept, 3, dtype=torch.double)
        frequencies = scipy.fft.dct(y.numpy(), axis=1, norm="ortho")
        back = torch.from_numpy(scipy.fft.idct(frequencies, n=n_tokens, axis=1, norm="ortho"))
        torch.testing.assert_close(step.unmerge(y), back)
        torch.testing.assert_close(step.unmerge(y.float()), back.float(), **CLOSE)


def test_going_back_undoes_it_up_to_the_high_frequencies():
    for n_tokens, kept in LENGTHS:
        step, y = truncation(2, n_tokens, kept), torch.randn(2, kept, 3)
        torch.testing.assert_close(step.merge(step.unmerge(y)), y, **CLOSE)
        smooth = step.unmerge(y)
        torch.testing.assert_close(step.unmerge(step.merge(smooth)), smooth, **CLOSE)


def test_a_constant_stays_a_constant():
    for n_tokens, kept in LENGTHS:
        many, few, step = torch.ones(1, n_tokens, 2), torch.ones(1, kept, 2), truncation(1, n_tokens, kept)
        torch.testing.assert_close(step.merge(many), few * (n_tokens / kept) ** 0.5, **CLOSE)
        torch.testing.assert_close(step.unmerge(few), many * (kept / n_tokens) ** 0.5, **CLOSE)
        torch.testing.assert_close(step.unmerge(few, scores=True), many, **CLOSE)


def test_truncations_compose_to_one():
    x = torch.randn(2, 60, 3)
    steps = [truncation(2, n, m) for n, m in ((60, 45), (45, 31), (31, 16))]
    total = steps[0].then(steps[1]).then(steps[2])
    assert isinstance(total, Truncation) and (total.n_tokens, total.kept) == (60, 16)
    stepwise = x
    for step in steps:
        stepwise = step.merge(stepwise)
    torch.testing.assert_close(total.merge(x), stepwise, **CLOSE)
    for scores in (False, True):
        back = stepwise
        for step in reversed(steps):
            back = step.unmerge(back, scores)
        torch.testing.assert_close(total.unmerge(stepwise, scores), back, **CLOSE)


def test_anything_else_composes_to_a_chain():
    first, x = dct(torch.randn(2, 30, 3), r=10), torch.randn(2, 30, 3)
    second = bipartite(torch.randn(2, 20, 4), r=5)
    total = first.then(second)
    assert isinstance(total, Chain) and not hasattr(total, "assignment")
    y = second.merge(first.merge(x))
    assert torch.equal(total.merge(x), y)
    assert torch.equal(total.unmerge(y, True), first.unmerge(second.unmerge(y, True), True))


def test_at_most_half_of_the_tokens_go_and_sizes_add_up():
    for n_tokens, r, kept in ((64, 0, 64), (64, 10, 54), (64, 40, 32), (9, 100, 5), (1, 3, 1), (0, 3, 0)):
        step = dct(torch.randn(2, n_tokens, 3), r=r)
        assert step.counts.tolist() == [kept, kept] and step.lengths == (kept, kept)
        assert step.sizes.shape == (2, kept) and step.sizes.dtype == torch.float32
        torch.testing.assert_close(step.sizes.sum(1), torch.full((2,), float(n_tokens)))
        assert step.padding is None and step.width == kept and not hasattr(step, "assignment")
    x = torch.randn(2, 8, 3)
    assert torch.equal(dct(x, r=0).merge(x), x)


def test_gradients_are_right():
    for n_tokens, kept in ((1, 1), (6, 1), (6, 4), (7, 4)):
        step = truncation(1, n_tokens, kept)
        assert torch.autograd.gradcheck(step.merge, torch.randn(1, n_tokens, 2, dtype=torch.double, requires_grad=True))
        assert torch.autograd.gradcheck(step.unmerge, torch.randn(1, kept, 2, dtype=torch.double, requires_grad=True))


def test_bfloat16_is_computed_in_float32():
    x = torch.randn(2, 40, 3).bfloat16()
    step = dct(x, r=15)
    assert torch.equal(step.merge(x), step.merge(x.float()).bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        inside = step.merge(x.float())
    assert torch.equal(inside, step.merge(x.float()))


def test_long_sequences_stay_exact():
    x = torch.randn(1, 16384, 2)
    step = dct(x, r=8192)
    frequencies = scipy.fft.dct(x.double().numpy(), axis=1, norm="ortho")[:, :8192]
    expected = torch.from_numpy(scipy.fft.idct(frequencies, axis=1, norm="ortho")).float()
    torch.testing.assert_close(step.merge(x), expected, **CLOSE)


def test_an_empty_batch_gives_nothing():
    step = dct(torch.randn(0, 20, 4), r=5)
    assert step.merge(torch.randn(0, 20, 4)).shape == (0, 15, 4)
    assert step.unmerge(torch.randn(0, 15, 4)).shape == (0, 20, 4)


def test_a_wrong_number_is_refused():
    for r in (-1, 1.5, True):
        with pytest.raises(ValueError, match="number of tokens"):
            dct(torch.randn(1, 8, 3), r=r)
