"""Attention weights on request.

Attention runs fused and never forms its weights. Here they are formed from the queries and keys that go into it, so
that the ordinary path stays as it is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@contextmanager
def recorded_attention(attn: nn.Module) -> Iterator[list[Tensor]]:
    """Add the weights of forward passes through an attention module of timm to the list that it yields, while open.

    Yields:
        (B, heads, L, L), after the softmax, for every time that attention runs: once per pass, but once per image where
        images of different lengths are concatenated, or never where a kernel of its own takes them.
    """
    mode = _Recorder()
    with (
        attn.register_forward_pre_hook(lambda module, inputs: mode.__enter__() and None),
        attn.register_forward_hook(lambda module, inputs, output: mode.__exit__(None, None, None), always_call=True),
        # where attention forms its weights itself, they go through the dropout
        attn.attn_drop.register_forward_pre_hook(lambda module, inputs: mode.record.append(inputs[0].detach())),
    ):
        yield mode.record


class _Recorder(TorchFunctionMode):
    """Forms the weights of fused attention in addition to its result."""

    def __init__(self) -> None:
        super().__init__()
        self.record: list[Tensor] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            mask = kwargs.get("attn_mask")
            if hasattr(mask, "attend"):  # a mask that takes the place of this function: what it calls is looked at
                with self:
                    return type(mask).__torch_function__(function, types, args, kwargs)
            self.record.append(_weights(*args, **kwargs))
        return function(*args, **kwargs)


@torch.no_grad()
def _weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, scale: float | None = None, **_: Any
) -> Tensor:
    logits = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    if attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(dim=-1)
