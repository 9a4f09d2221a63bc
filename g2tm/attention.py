"""How merged tokens enter later attention layers: one additive bias on the logits of the keys."""

import torch

ATTENTION_MODES = ("none", "proportional", "inverse")


def check_attention(mode):
    """Raise a ValueError for an unknown attention mode."""
    if mode not in ATTENTION_MODES:
        raise ValueError(f"attention {mode!r}: choose {', '.join(ATTENTION_MODES)}")


def attention_bias(sizes, mode, padding=None):
    """Bias of every key.

    Args:
        sizes: (B, M), patches per token.
        mode: "none"; "proportional" adds log(size), so that a token counts as often as it has patches
            (ToMe, section 3); "inverse" subtracts it.
        padding: (B, M), bool, slots that no query may see; None: there are none.

    Returns:
        (B, 1, 1, M), float32, or None where nothing is to be added.
    """
    check_attention(mode)
    if mode == "none" and padding is None:
        return None
    sign = {"none": 0, "proportional": 1, "inverse": -1}[mode]
    bias = sign * torch.log(sizes.clamp(min=1))
    if padding is not None:
        bias = bias.masked_fill(padding, float("-inf"))
    return bias[:, None, None, :]
