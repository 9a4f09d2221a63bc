"""Attention weights on request.

timm's attention runs fused and never forms its weights. Here they are recomputed from what went into one
attention module, so that the ordinary path stays as it is.
"""

from contextlib import contextmanager
from types import SimpleNamespace


def attention_weights(attn, x, attn_mask=None):
    """Weights of a timm `Attention` module.

    Args:
        attn: the module.
        x: its input, (B, L, D).
        attn_mask: its additive bias, broadcastable to (B, heads, L, L), or None.

    Returns:
        (B, heads, L, L), after the softmax.
    """
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))
    queries, keys, _ = qkv.permute(2, 0, 3, 1, 4)
    logits = attn.q_norm(queries) * attn.scale @ attn.k_norm(keys).transpose(-2, -1)
    if attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(dim=-1)


@contextmanager
def recorded_attention(attn):
    """While open, a forward pass through `attn` leaves its weights in the `weights` of the object it yields."""
    record = SimpleNamespace(weights=None)

    def keep(module, args, kwargs):
        record.weights = attention_weights(module, args[0], kwargs.get("attn_mask"))

    handle = attn.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield record
    finally:
        handle.remove()
