"""The matrix products of a pass by themselves."""

from copy import deepcopy

import pytest
import torch
from matrix_products import products_alone
from torch.utils.flop_counter import FlopCounterMode

import patch
from segm.merging import build_model

NET = {"backbone": "vit_tiny_patch16_384", "image_size": 64, "n_cls": 5, "decoder": {"name": "mask_transformer"}}


def products(call, *args):
    """Operations in matrix products and fused attention, by PyTorch's own count."""
    with FlopCounterMode(display=False) as counter:
        call(*args)
    return counter.get_total_flops()


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_products_of_a_pass_are_repeated_and_nothing_else(batch_size):
    torch.manual_seed(0)
    model, images = build_model(NET).eval(), torch.randn(batch_size, 3, 64, 64)
    merged = patch.apply(deepcopy(model), "graph", threshold=-1.0)
    counts = []
    with torch.inference_mode():
        for one in (model, merged):
            repeat = products_alone(one.network, images)
            counts.append(products(repeat))
            assert counts[-1] == products(one.network, images)
    assert 0 < counts[1] < counts[0]
