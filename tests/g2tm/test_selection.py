"""Selection runs in exact float32 whatever a user has set, without gradients, and in one graph."""

import pytest
import torch

from g2tm.selection import cached, ranks, selection, true_positions
from g2tm.similarity import diagonal, exact_product, first_maximum, most_similar, row_dot, unit_vectors


@pytest.fixture(params=["high", "medium"])
def low_precision(request):
    torch.set_float32_matmul_precision(request.param)
    yield request.param
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def low_precision_of_one_backend():
    """Then `torch.get_float32_matmul_precision` raises an error."""
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    yield
    torch.set_float32_matmul_precision("highest")


def images(n_tokens=130, dim=64):
    return unit_vectors(torch.randn(2, n_tokens, dim, generator=torch.Generator().manual_seed(3)))


def check_products():
    x = images()
    expected = (x.double() @ x.double().mT).float()
    torch.testing.assert_close(exact_product(x, x.mT), expected, atol=1e-6, rtol=0)
    rounded = (x.bfloat16() @ x.bfloat16().mT).float()
    assert (rounded - expected).abs().max() > 1e-3  # else nothing above could have failed
    found = most_similar(x[:, ::2], x[:, 1::2])
    best = expected[:, ::2, 1::2].max(-1)
    torch.testing.assert_close(found[0], best.values, atol=1e-6, rtol=0)
    assert torch.equal(found[1], best.indices)
    torch.testing.assert_close(row_dot(x[:, 1:], x[:, :-1]), expected.diagonal(1, 1, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.vecdot(x[:, 1:], x[:, :-1]), expected.diagonal(1, 1, 2), atol=1e-6, rtol=0)


def test_products_are_exact():
    check_products()


def test_products_are_exact_whatever_precision_is_set(low_precision):
    assert torch.get_float32_matmul_precision() == low_precision
    check_products()


def test_products_are_exact_where_one_backend_may_round(low_precision_of_one_backend):
    check_products()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_products_are_exact_on_cuda(low_precision):
    x = images().cuda()
    expected = (x.double() @ x.double().mT).float()
    torch.testing.assert_close(exact_product(x, x.mT), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(torch.linalg.vecdot(x[:, 1:], x[:, :-1]), expected.diagonal(1, 1, 2), atol=1e-6, rtol=0)


def test_a_product_is_one_graph_and_follows_the_setting():
    x, compiled = images(), torch.compile(lambda x: exact_product(x, x.mT), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), x @ x.mT)
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(compiled(x), (x.double() @ x.double().mT).float())
    finally:
        torch.set_float32_matmul_precision("highest")


def test_double_products_stay_double():
    assert exact_product(images().double(), images().double().mT).dtype == torch.float64


def test_selection_takes_no_gradients_and_no_autocast():
    x = images().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        product = selection(lambda x: x @ x.mT)(x)
    assert product.dtype == torch.float32 and not product.requires_grad


def test_ties_go_to_the_first():
    values = torch.tensor([[1.0, 3.0, 3.0, float("-inf"), 1.0]])
    assert ranks(values).tolist() == [[2, 0, 1, 4, 3]]
    found = first_maximum(values)
    assert found[0].tolist() == [3] and found[1].tolist() == [1]
    assert true_positions(torch.tensor([[False, True, False, True]]), 2).tolist() == [[1, 3]]


def test_the_diagonal_of_a_part_is_where_tokens_meet_themselves():
    assert torch.equal(diagonal(torch.zeros(2, 3, 9), 4), torch.eye(9).bool()[4:7])


class Counted:
    computed = 0

    @cached
    def number(self):
        """A number."""
        self.computed += 1
        return self.computed


def test_cached_computes_once_for_each_object():
    one, other = Counted(), Counted()
    assert [one.number, one.number, other.number] == [1, 1, 1] and one.computed == 1
    assert Counted.number.__doc__ == "A number."


def test_cached_stays_in_one_graph():
    def function(x):
        return x + Counted().number

    assert torch.compile(function, fullgraph=True, backend="eager")(torch.zeros(1)) == 1
