"""The attention bias of merged tokens, and the attention that tokens get."""

import pytest
import torch

from g2tm import attention_bias, cls_attention, received_attention

SIZES = torch.tensor([[1.0, 4.0, 2.0], [7.0, 1.0, 0.0]])
PADDING = torch.tensor([[False, False, False], [False, False, True]])


def test_proportional_counts_a_token_as_often_as_it_has_patches():
    """Attention over merged tokens equals attention over their copies."""
    sizes, keys, values = torch.tensor([[3, 1, 2]]), torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    query = torch.randn(1, 1, 5, 4)
    bias = attention_bias(sizes.float(), "proportional")
    attend = torch.nn.functional.scaled_dot_product_attention
    merged = attend(query, keys[None], values[None], attn_mask=bias)
    copies = [t.repeat_interleave(sizes[0], dim=1)[None] for t in (keys, values)]
    torch.testing.assert_close(merged, attend(query, *copies))


def test_inverse_is_the_opposite():
    assert torch.equal(attention_bias(SIZES[:1], "inverse"), -attention_bias(SIZES[:1], "proportional"))


def test_padding_is_never_seen():
    for mode in ("none", "proportional", "inverse"):
        bias = attention_bias(SIZES, mode, PADDING)
        assert bias.shape == (2, 1, 1, 3)
        assert torch.equal(bias[:, 0, 0] == float("-inf"), PADDING)


def test_sizes_below_one_are_taken_as_they_are_and_empty_ones_stay_finite():
    sizes = torch.tensor([[0.25, 1e-3, 0.0]], requires_grad=True)
    bias = attention_bias(sizes, "proportional")
    torch.testing.assert_close(bias[0, 0, 0, :2], sizes[0, :2].log())
    assert bias.isfinite().all()
    bias.sum().backward()
    torch.testing.assert_close(sizes.grad, torch.tensor([[4.0, 1e3, 0.0]]))


def test_padding_gives_finite_gradients():
    sizes = SIZES.clone().requires_grad_()
    attention_bias(sizes, "inverse", PADDING).exp().sum().backward()
    assert sizes.grad.isfinite().all()


def test_nothing_to_add_is_none():
    assert attention_bias(SIZES, "none") is None


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="proportional"):
        attention_bias(SIZES, "prop")


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_the_attention_that_tokens_get_is_exact(monkeypatch, precision):
    """Whatever precision a user has set, in one piece and in parts, with padding."""
    query, key = torch.randn(2, 3, 50, 16), torch.randn(2, 3, 50, 16)
    padding = torch.arange(50) >= torch.tensor([[50], [31]])
    bias = attention_bias(torch.randint(1, 5, (2, 50)).float(), "proportional", padding)
    whole = (query.double() @ key.double().mT * 0.25 + bias).softmax(-1)
    asks = (~padding)[:, None, :, None]
    means = (whole * asks).sum((1, 2)) / (3 * (~padding).sum(1, keepdim=True))
    torch.set_float32_matmul_precision(precision)
    try:
        for most in (2**24, 500):
            monkeypatch.setattr("g2tm.similarity.MAX_SIMILARITIES", most)
            row, found = (see(query, key, bias=bias, scale=0.25) for see in (cls_attention, received_attention))
            torch.testing.assert_close(row, whole[:, :, 0].mean(1).float(), atol=1e-6, rtol=0)
            torch.testing.assert_close(found, means.float(), atol=1e-6, rtol=0)
            assert not found[padding].any()
    finally:
        torch.set_float32_matmul_precision("highest")
