"""Merged tokens in later attention layers, by a bias of their keys, and the attention that tokens get."""

import torch
from torch import Tensor

from g2tm.selection import selection
from g2tm.similarity import chunks, exact_product
from g2tm.validation import check_choice

ATTENTION_MODES = ("none", "proportional", "inverse")
SMALLEST_SIZE = 1e-6  # of an empty token, whose logarithm must stay finite


def attention_bias(sizes: Tensor, mode: str, padding: Tensor | None = None) -> Tensor | None:
    """Bias of every key; differentiable in the sizes.

    Args:
        sizes: (B, M), of the tokens; at least `SMALLEST_SIZE` is taken.
        mode: "none"; "proportional" adds log(size), so that a token counts as often as it has patches
            (ToMe, section 3); "inverse" subtracts it.
        padding: (B, M), bool, slots that no query may see; None: there are none.

    Returns:
        (B, 1, 1, M), float32, or None where nothing is to be added.
    """
    check_choice("attention", mode, ATTENTION_MODES)
    if mode == "none" and padding is None:
        return None
    sign = {"none": 0, "proportional": 1, "inverse": -1}[mode]
    bias = sign * torch.log(sizes.clamp(min=SMALLEST_SIZE))
    if padding is not None:
        bias = bias.masked_fill(padding, float("-inf"))
    return bias[:, None, None, :]


@selection
def cls_attention(query: Tensor, key: Tensor, *, bias: Tensor | None = None, scale: float) -> Tensor:
    """Attention of the first token, which is CLS, to every token, mean over the heads: (B, L), float32.

    query, key: (B, H, L, d); bias: (B, 1, 1, L), of the keys, None: none; scale: of the logits.
    """
    return _probabilities(query[:, :, :1], key, bias, scale).mean((1, 2))


@selection
def received_attention(query: Tensor, key: Tensor, *, bias: Tensor | None = None, scale: float) -> Tensor:
    """Attention that every token gets, mean over heads and queries: (B, L), float32; 0 for padding, which asks nothing.

    The map itself, (B, H, L, L), is never there as a whole. Arguments as for `cls_attention`; a bias of -inf marks
    padding.
    """
    n_images, n_heads, length, _ = query.shape
    asks = query.new_ones(n_images, 1, 1, length) if bias is None else (bias > float("-inf")).to(query.dtype)
    asks = asks.float().expand(n_images, n_heads, 1, length)
    total, first = query.new_zeros(n_images, length, dtype=torch.float32), 0
    for part in chunks(query.flatten(0, 1), length):
        part = part.unflatten(0, (n_images, n_heads))
        last = first + part.shape[2]
        total = total + exact_product(asks[..., first:last], _probabilities(part, key, bias, scale)).sum((1, 2))
        first = last
    return total / (n_heads * asks[:, 0].sum(2))


def _probabilities(query: Tensor, key: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(B, H, I, d), (B, H, L, d) -> (B, H, I, L), float32."""
    logits = exact_product(query.float() * scale, key.float().mT)
    return (logits if bias is None else logits + bias.float()).softmax(-1)
