"""DTEM: the soft choice against its definition; gradients; the split."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from g2tm import embed, soft_merge, split
from g2tm.dtem import SoftMerge, soft_top_r
from g2tm.reduction import Chain

DATA = Path(__file__).parents[1] / "data"
TRAINING = "random", "parity", "soft"


@pytest.fixture(scope="module")
def vectors():
    return load_file(DATA / "opentome_b.safetensors")


def training_step(vectors, case, metric, sizes):
    return soft_merge(
        metric,
        r=int(vectors[f"{case}.r"]),
        inverse_temperature=float(vectors[f"{case}.inverse_temperature"]),
        a_index=vectors[f"{case}.a_index"],
        b_index=vectors[f"{case}.b_index"],
        sizes=sizes,
    )


def published_loop(similarity, r, inverse_temperature):
    """A softmax over all pairs in each round, as the paper writes it."""
    total, z = torch.zeros_like(similarity), similarity
    for _ in range(r):
        q = (z * inverse_temperature).flatten(1).softmax(1).view_as(z)
        total = total + q
        z = z + (1 - q.sum(2, keepdim=True)).clamp(min=1.1920929e-7).log()
    return total / total.detach().sum(2, keepdim=True).clamp(min=1)


def test_choosing_among_rows_is_the_loop_over_all_pairs():
    for shape, r, inverse_temperature in (((2, 6, 7), 3, 10), ((2, 6, 7), 6, 30), ((1, 5, 2), 4, 1), ((2, 1, 3), 1, 5)):
        similarity = torch.rand(shape, dtype=torch.double, requires_grad=True)
        within, amount = soft_top_r(similarity, r, inverse_temperature)
        shares, expected = within * amount.unsqueeze(2), published_loop(similarity, r, inverse_temperature)
        torch.testing.assert_close(shares, expected)
        cotangent = torch.randn(shape, dtype=torch.double)
        gradients = [torch.autograd.grad((y * cotangent).sum(), similarity)[0] for y in (shares, expected)]
        torch.testing.assert_close(*gradients)


def test_pairs_are_stored_once_however_many_rounds():
    def stored(r):
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address comes twice
            return tensor

        metric = torch.randn(1, 201, 4, requires_grad=True)
        a, b = split(torch.ones(1, 201), 201, False)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            step = soft_merge(metric, r=r, inverse_temperature=10, a_index=a, b_index=b)
            merged = step.merge(torch.randn(1, 201, 4))
        assert merged.requires_grad and step.sizes.requires_grad
        return sum(tensor.numel() >= 100 * 100 for tensor in kept.values())

    assert stored(1) == stored(40) == 1


def test_gradients_are_right():
    a, b = torch.tensor([[1, 3, 5]]), torch.tensor([[2, 4, 6]])

    def both(x, metric, sizes):
        step = soft_merge(metric, r=2, inverse_temperature=5, a_index=a, b_index=b, sizes=sizes)
        return step.merge(x), step.sizes

    x, metric = (torch.randn(1, 8, 3, dtype=torch.double, requires_grad=True) for _ in range(2))
    sizes = torch.rand(1, 8, dtype=torch.double).add(1).requires_grad_()
    shares = soft_merge(metric, r=2, inverse_temperature=5, a_index=a, b_index=b, sizes=sizes).shares
    assert shares.sum(2).max() < 1  # beyond, the divisor counts as constant
    assert torch.autograd.gradcheck(both, (x, metric, sizes))


def test_size_is_kept_and_nothing_moves_but_b(vectors):
    x, sizes = vectors["n65.x"], vectors["n65.size"][..., 0]
    for name in TRAINING:
        case = f"dtem.train.{name}"
        step = training_step(vectors, case, vectors["n65.metric"], sizes)
        torch.testing.assert_close(step.sizes.sum(1), sizes.sum(1))
        moved = (step.merge(x) != x).any(2)
        assert not moved.scatter(1, vectors[f"{case}.b_index"], False).any() and moved.any()
        y = torch.randn(2, 65, 3)
        assert step.unmerge(y) is y and step.unmerge(y, scores=True) is y


def test_tokens_that_count_nothing_stay_finite():
    sizes = torch.zeros(1, 9).requires_grad_()
    metric, x = torch.randn(1, 9, 4, requires_grad=True), torch.randn(1, 9, 3)
    a, b = split(sizes, 9, False)
    step = soft_merge(metric, r=2, inverse_temperature=30, a_index=a, b_index=b, sizes=sizes)
    assert torch.equal(step.merge(x), x)
    (step.merge(x).sum() + step.sizes.sum()).backward()
    assert metric.grad.isfinite().all() and sizes.grad.isfinite().all()


def test_nothing_to_merge_changes_nothing():
    for n_tokens, r in ((9, 0), (1, 3), (0, 3)):
        metric, x = torch.randn(2, n_tokens, 4), torch.randn(2, n_tokens, 3)
        a, b = split(torch.ones(2, n_tokens), n_tokens, False)
        step = soft_merge(metric, r=r, inverse_temperature=30, a_index=a, b_index=b)
        assert torch.equal(step.merge(x), x) and torch.equal(step.sizes, torch.ones(2, n_tokens))


def test_it_runs_in_float32_under_autocast_and_keeps_the_dtype(vectors):
    sizes, metric = vectors["n65.size"][..., 0], vectors["n65.metric"]
    step = training_step(vectors, "dtem.train.parity", metric, sizes)
    with torch.autocast("cpu", torch.bfloat16):
        inside = training_step(vectors, "dtem.train.parity", metric, sizes)
        merged = inside.merge(vectors["n65.x"])
    assert torch.equal(merged, step.merge(vectors["n65.x"])) and torch.equal(inside.sizes, step.sizes)
    assert step.merge(vectors["n65.x"].bfloat16()).dtype == torch.bfloat16


def test_soft_steps_chain():
    x, metric = torch.randn(2, 21, 3), torch.randn(2, 21, 4)
    total, stepwise, sizes = None, x, torch.ones(2, 21)
    for n_live in (21, 17, 13):
        a, b = split(sizes, n_live, True)
        step = soft_merge(metric, r=4, inverse_temperature=30, a_index=a, b_index=b, sizes=sizes)
        stepwise, sizes, total = step.merge(stepwise), step.sizes, step if total is None else total.then(step)
    assert isinstance(total, Chain) and not hasattr(total, "assignment") and not isinstance(total, SoftMerge)
    assert torch.equal(total.merge(x), stepwise) and torch.equal(total.sizes, sizes)


def test_the_metric_lets_a_share_of_its_gradient_through():
    weight, bias = torch.randn(4, 6, requires_grad=True), torch.randn(4, requires_grad=True)
    plain = torch.randn(2, 5, 6)
    cotangent = torch.randn(2, 5, 4)
    for share, options in ((0, {"share": 0}), (1, {"share": 1}), (0.1, {})):
        h = plain.clone().requires_grad_()
        metric = embed(h, weight, bias, **options)
        assert torch.equal(metric, F.linear(plain, weight, bias))
        to_h, to_weight, to_bias = torch.autograd.grad((metric * cotangent).sum(), (h, weight, bias))
        torch.testing.assert_close(to_h, share * cotangent @ weight.detach())
        torch.testing.assert_close(to_weight, torch.einsum("bne,bnd->ed", cotangent, plain))
        torch.testing.assert_close(to_bias, cotangent.sum((0, 1)))


def test_the_split_of_the_paper_alternates(vectors):
    a, b = split(torch.ones(2, 64), 64, False)
    assert torch.equal(1 + a, vectors["dtem.train.parity.a_index"])  # which count CLS
    assert torch.equal(1 + b, vectors["dtem.train.parity.b_index"])
    a, b = split(torch.ones(1, 7), 7, False)
    assert a.tolist() == [[0, 2, 4]] and b.tolist() == [[1, 3, 5, 6]]


def test_the_largest_tokens_take_part_and_of_equal_ones_the_first():
    sizes = torch.tensor([[1.0, 3, 1, 0, 2, 1, 3], [1.0, 1, 1, 1, 1, 1, 1]])
    a, b = split(sizes, 5, False)
    assert a.tolist() == [[0, 2], [0, 2]] and b.tolist() == [[1, 4, 6], [1, 3, 4]]
    for n_live, live in ((-1, 0), (0, 0), (1, 1), (7, 7), (50, 7)):
        for random in (False, True):
            a, b = split(sizes, n_live, random)
            assert a.shape == (2, live // 2) and b.shape == (2, live - live // 2)


def test_the_random_split_is_a_half_of_each_image_and_follows_its_generator():
    sizes = torch.rand(3, 42)
    for n_live in (42, 29, 13):
        a, b = split(sizes, n_live, True, torch.Generator().manual_seed(7))
        again, _ = split(sizes, n_live, True, torch.Generator().manual_seed(7))
        other, _ = split(sizes, n_live, True, torch.Generator().manual_seed(8))
        assert torch.equal(a, again) and not torch.equal(a, other)
        live = sizes.topk(n_live, dim=1).indices.sort(1).values
        assert torch.equal(torch.cat([a, b], 1).sort(1).values, live)
        assert (a.diff(dim=1) > 0).all() and (b.diff(dim=1) > 0).all()
        assert a.shape[1] == n_live // 2


def test_a_wrong_number_is_refused():
    index = torch.tensor([[1]])
    for r in (-1, 1.5, True):
        with pytest.raises(ValueError, match="number of tokens"):
            soft_merge(torch.randn(1, 3, 4), r=r, inverse_temperature=30, a_index=index, b_index=index)
