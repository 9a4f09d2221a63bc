"""How merged tokens enter later attention layers: one additive bias on the logits of the keys."""

import torch
from torch import Tensor

ATTENTION_MODES = ("none", "proportional", "inverse")
SMALLEST_SIZE = 1e-6  # of an empty token, whose logarithm must stay finite


def attention_bias(sizes: Tensor, mode: str, padding: Tensor | None = None) -> Tensor | None:
    """Bias of every key; differentiable in the sizes.

    Args:
        sizes: (B, M), patches per token, or what a method counts instead; at least `SMALLEST_SIZE` is taken.
        mode: "none"; "proportional" adds log(size), so that a token counts as often as it has patches
            (ToMe, section 3); "inverse" subtracts it.
        padding: (B, M), bool, slots that no query may see; None: there are none.

    Returns:
        (B, 1, 1, M), float32, or None where nothing is to be added.

    Raises:
        ValueError: unknown mode.
    """
    if mode not in ATTENTION_MODES:
        raise ValueError(f"attention {mode!r}: choose {', '.join(ATTENTION_MODES)}")
    if mode == "none" and padding is None:
        return None
    sign = {"none": 0, "proportional": 1, "inverse": -1}[mode]
    bias = sign * torch.log(sizes.clamp(min=SMALLEST_SIZE))
    if padding is not None:
        bias = bias.masked_fill(padding, float("-inf"))
    return bias[:, None, None, :]
