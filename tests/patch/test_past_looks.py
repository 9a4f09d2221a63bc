"""Tokens of images that differ in number are packed as long as no hook reads a block, and again after it."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.families import EXPOSED, FAMILIES, states
from tests.helpers import different_images


class Feeds(TorchFunctionMode):
    """Notes how many rows enter every MLP: one where images are packed."""

    def __init__(self):
        super().__init__()
        self.rows = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if len(args) > 1 and getattr(args[1], "shape", ()) == (128, 32):  # whichever function it is
            self.rows.append(args[0].shape[0])
        return function(*args, **(kwargs or {}))


def rows(family, model, images):
    with Feeds() as feeds:
        family.run(model, images)
    return feeds.rows[:3]


@torch.inference_mode()
@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "mmseg"])  # whose attention is explicit
def test_a_past_look_does_not_keep_tokens_from_being_packed(name):
    family, images = FAMILIES[name], different_images(3)
    model = family.patched("graph", layers=[1])
    expected = rows(family, model, images)
    assert expected == [1, 1, 1]
    handle = next(iter(list(family.blocks(model))[1].children())).register_forward_hook(lambda *_: None)
    assert rows(family, model, images) == [3, 3, 3]  # a hook reads a block
    handle.remove()
    assert rows(family, model, images) == expected
    if name in EXPOSED:
        states(model, images)
        assert rows(family, model, images) == expected
        plain = family.build()
        states(plain, images)  # before patching
        assert rows(family, family.patched("graph", model=plain, layers=[1]), images) == expected
