"""Degenerate images in every method and every precision: nothing that is not finite comes out."""

import copy
from itertools import product

import pytest
import torch

import patch
from segm.losses import segmentation_loss
from segm.model.factory import create_segmenter
from tests.helpers import METHOD_OPTIONS, by_speed, with_parts

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIDE = 24  # pixels; patches of 8
# Options with which everything merges that a method can merge, or nothing.
EXTREMES = {
    "graph": ({"threshold": -1.0}, {"threshold": 1.0}, {"tokens": 1}, {"tokens": 0.5}),
    "algm": (
        {"layers": [1, 3], "threshold": -1.0},
        {"layers": [1, 3], "threshold": 1.0},
        {"layers": [1, 3], "tokens": [0.75, 0.7]},
    ),
    "mpm": ({"layers": [1, 2, 3]},),
    "random": ({"layers": [1, 2, 3], "tokens": [0.9, 0.5, 1]},),
    "atc": ({"layers": [1, 2, 3], "keep": 0.1, "linkage": "complete"}, {"keep": 1.0}),
    "mctf": ({"r": 0}, {"r": 8, "tau": (1, 20, 40)}, {"r": 5, "bidirectional": False}),
    "pitome": ({"r": 0}, {"r": 8, "variant": "paper"}),
    "diffrate": ({"r": 0}, {"r": 8}, {"prune_kept": [2, 2, 2]}),
    "ltmp": (
        {"merge_threshold": 1.0, "prune_threshold": 0.0},
        {"merge_threshold": 0.0, "prune_threshold": 1.0},
        {"tokens": 1},
        {"tokens": 0.7},
    ),
}
BY_R = ({"r": 0}, {"r": 8})


def images():
    """Name -> pictures (2, 3, H, W): of one color, of one pixel, of noise, of one patch, none."""
    flat, dark, dot = torch.ones(2, 3, SIDE, SIDE), torch.zeros(2, 3, SIDE, SIDE), torch.zeros(2, 3, SIDE, SIDE)
    dot[:, :, 5, 5] = 1.0
    noise = torch.randn(2, 3, SIDE, SIDE)
    halves = torch.cat([noise[..., : SIDE // 2], flat[..., : SIDE // 2]], dim=-1)
    found = {"white": flat, "black": dark, "dot": dot, "noise": noise, "bright noise": 100 * noise, "halves": halves}
    return found | {"a patch": noise[..., :8, :8], "a pixel": noise[..., :1, :1], "none": noise[:0], "one": noise[:1]}


def models(net, zero_norm, method):
    """(options, model) with attention of all kinds; `zero_norm`: tokens are zero until position is added."""
    extremes = EXTREMES.get(method, BY_R if patch.find(method).takes("r") else ())
    for options in (METHOD_OPTIONS[method], *extremes):
        for attention in ("none",) if method == "clustvit" else ("none", "proportional"):
            model = create_segmenter(net)
            if zero_norm:
                for parameter in (model.encoder.patch_embed.proj, model.encoder.pos_embed):
                    torch.nn.init.zeros_(getattr(parameter, "weight", parameter))
                torch.nn.init.zeros_(model.encoder.patch_embed.proj.bias)
            with_parts(model.encoder, method)
            yield options, patch.apply(model, method, **options, attention=attention)


def gradients_are_finite(model, pictures):
    """Whether one backward pass gives finite gradients."""
    model.zero_grad()
    labels = torch.zeros(len(pictures), *pictures.shape[-2:], dtype=torch.long)
    segmentation_loss(model(pictures), labels).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return bool(gradients) and all(bool(gradient.isfinite().all()) for gradient in gradients)


SLOW = [(torch.float32, False, name) for name in ("graph", "ltmp")] + [(torch.bfloat16, True, "algm")]


@pytest.mark.parametrize(
    ("dtype", "zero_norm", "method"), by_speed(product(DTYPES, (False, True), METHOD_OPTIONS), slow=SLOW)
)
def test_scores_and_gradients_are_finite(small_net, dtype, zero_norm, method):
    net = small_net | {"image_size": [SIDE, SIDE], "patch_size": 8, "n_layers": 3}
    for options, model in models(net, zero_norm, method):
        model.to(dtype)
        plain = patch.remove(copy.deepcopy(model)).train()
        for name, pictures in images().items():
            where, pictures = f"{method} {options} {dtype} {name}", pictures.to(dtype)
            with torch.inference_mode():
                logits = model.eval()(pictures)
            assert logits.shape == (len(pictures), model.n_cls, *pictures.shape[-2:]), where
            assert logits.isfinite().all(), where
            # Without a loss scaler, float16 overflows in the plain model too.
            assert gradients_are_finite(model.train(), pictures) or not gradients_are_finite(plain, pictures), where
