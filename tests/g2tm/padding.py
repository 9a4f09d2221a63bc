"""Padded batches, for the methods that reduce such images one by one."""

import torch
from torch.nn.functional import pad


def check_padding(merge, lengths, **tensors):
    """A padded batch is reduced as its images are alone, whatever stands in the padding.

    Args:
        merge: from the tensors, by keyword, and `padding` to a reduction.
        lengths: of the images.
        tensors: (B, N, ...) each, full; `x` is merged as well.
    """
    n_tokens = max(lengths)
    padding = torch.arange(n_tokens) >= torch.tensor(lengths)[:, None]
    padded = {name: value[:, :n_tokens].clone() for name, value in tensors.items()}
    for value in padded.values():
        value[padding] = 1e3
    step = merge(**{name: value for name, value in padded.items() if name != "x"}, padding=padding)
    merged = step.merge(padded["x"])
    assert torch.equal(step.counts, torch.tensor(step.lengths))
    expected = torch.arange(step.width) >= step.counts[:, None]
    assert torch.equal(expected if step.padding is None else step.padding, expected)
    for image, length in enumerate(lengths):
        own = {name: value[image : image + 1, :length] for name, value in tensors.items()}
        alone = merge(**{name: value for name, value in own.items() if name != "x"}, padding=None)
        assert step.lengths[image] == alone.width
        assert torch.equal(step.assignment[image, :length], alone.assignment[0])
        fill = 0, step.width - alone.width
        torch.testing.assert_close(step.sizes[image], pad(alone.sizes[0], fill))
        torch.testing.assert_close(merged[image], pad(alone.merge(own["x"])[0], (0, 0, *fill)))
    return step
