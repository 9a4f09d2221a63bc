"""Options as users write them: tuples and lists are one, 0 is a number, and the meta device gives shapes."""

import numpy as np
import pytest
import torch

import patch
from segm.model.factory import create_segmenter
from tests.families import FAMILIES, NET
from tests.helpers import METHOD_OPTIONS, STATIC_OPTIONS, by_speed, different_images, with_parts

SEQUENCES = [
    ("tome", {"r": (2, 2, 2)}),
    ("tome", {"r": (2,) * 3, "layers": (1, 2, 3)}),
    ("tofu", {"r": [2, 1, 0]}),
    ("dct", {"r": (2, 2, 1)}),
    ("pitome", {"r": (2, 2, 2)}),
    ("crossget", {"r": (1, 2, 3)}),
    ("mctf", {"r": (2, 2, 2), "tau": (1, 20, 40)}),
    ("diffrate", {"prune_kept": (16, 14, 12), "merge_kept": (15, 12, 10)}),
    ("algm", {"layers": (1, 3), "tokens": (0.5, 0.25), "window": (2, 2)}),
    ("ltmp", {"tokens": (13, 10, 7)}),
    ("mpm", {"layers": (2, 3)}),
]


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit", "Dinov2"])
def test_a_tuple_a_list_and_an_array_are_one(name):
    family, images = FAMILIES[name], different_images(2)
    for method, options in SEQUENCES:
        outputs = []
        for kind in (tuple, list, lambda values: list(np.array(values))):
            given = {key: kind(value) for key, value in options.items()}
            model = patch.apply(family.build(), method, **given)
            outputs.append(family.run(model, images))
            assert patch.check(method, 3, (4, 4), **given) == patch.options(model), method
        assert all(torch.equal(outputs[0], other) for other in outputs[1:]), method


def test_numbers_of_numpy_are_numbers():
    model = patch.apply(FAMILIES["vit"].build(), "tome", r=np.int64(2), layers=list(np.arange(1, 3)))
    assert patch.options(model)["r"] == 2 and patch.options(model)["layers"] == (1, 2)
    model = patch.apply(FAMILIES["vit"].build(), "graph", threshold=np.float32(0.5))
    assert patch.options(model)["threshold"] == 0.5


@torch.inference_mode()
def test_0_is_a_number_and_not_left_out():
    """Nothing merges where 0 tokens are to go; and a threshold, a weight, a layer of 0 is one."""
    family, images = FAMILIES["vit"], different_images(2)
    expected = family.run(family.build(), images)
    for method in METHOD_OPTIONS:
        if not patch.find(method).takes("r"):
            continue
        for r in (0, [0, 0, 0]):
            model = patch.apply(with_parts(family.build(), method), method, r=r)
            torch.testing.assert_close(family.run(model, images), expected, atol=1e-5, rtol=1e-5, msg=method)
            last = patch.reduction(model)
            assert last is None or last.counts.tolist() == [16, 16], method
    for method in ("graph", "algm"):
        model = patch.apply(family.build(), method, threshold=0.0, layers=METHOD_OPTIONS[method].get("layers", [2]))
        assert patch.options(model)["threshold"] == 0.0
    model = patch.apply(family.build(), "ltmp", merge_threshold=0.0, prune_threshold=0.0)
    family.run(model, images)
    assert patch.reduction(model).counts.max() < 16  # whatever is not dissimilar merges
    model = patch.apply(with_parts(family.build(), "clustvit"), "clustvit", injection_point=0)
    assert patch.options(model)["layers"] == (0,)


@pytest.mark.parametrize(
    "name",
    by_speed(
        ["vit", "eva", "Dinov2", "DINOv3ViT", "SiglipVision", "segmenter", "mask transformer"],
        slow=["mask transformer"],
    ),
)
def test_on_the_meta_device_shapes_come_out(name):
    family, images = FAMILIES[name], torch.randn(3, 3, 32, 32, device="meta")
    for method, options in STATIC_OPTIONS.items():
        if method == "atc" or method not in family.methods:  # ATC leaves PyTorch
            continue
        alone = family.patched(method, **options)
        with torch.inference_mode():
            shape = family.run(alone, different_images(3)).shape
        for attention in ("none", "proportional"):
            model = family.patched(method, **options, attention=attention).to("meta")
            with torch.no_grad():
                found = family.run(model, images)
            assert found.shape == shape and found.device.type == "meta", method
            if hasattr(patch.reduction(alone), "lengths"):
                assert patch.reduction(model).lengths == patch.reduction(alone).lengths, method
            assert patch.reduction(model).sizes.device.type == "meta"


def test_a_model_that_is_made_on_the_meta_device_and_filled_later():
    with torch.device("meta"):
        model = create_segmenter(NET)
    patch.apply(model, "graph", tokens=7)
    source = FAMILIES["segmenter"].build()
    model.to_empty(device="cpu").load_state_dict(source.state_dict())
    images = different_images(2)
    with torch.inference_mode():
        expected = patch.apply(source, "graph", tokens=7)(images)
        torch.testing.assert_close(model.eval()(images), expected)
