"""A fixed number of tokens instead of a threshold."""

import itertools
from functools import partial

import pytest
import timm
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import patch
from patch.layout import Packed
from segm.model.factory import create_segmenter
from tests.helpers import Reads, Waits, different_images, with_parts

BUDGETS = [
    ("graph", {"tokens": 7}, [7]),
    ("graph", {"tokens": 1}, [1]),
    ("graph", {"tokens": 16}, [16]),
    ("graph", {"tokens": 0.5}, [8]),
    ("graph", {"tokens": 1.0}, [16]),
    ("graph", {"tokens": [5], "layers": [3]}, [5]),
    ("algm", {"tokens": 9, "layers": [1]}, [9]),
    ("algm", {"tokens": [9, 6], "layers": [1, 3]}, [9, 6]),
    ("algm", {"tokens": [0.5, 0.25], "layers": [1, 3]}, [8, 4]),
    ("algm", {"tokens": [12, 0.5], "layers": [1, 2]}, [12, 8]),
    ("algm", {"tokens": [13, 10], "layers": [1, 2], "window": (0, 0)}, [13, 10]),
    ("algm", {"tokens": 10, "layers": [1, 3]}, [10, 10]),
]


@pytest.fixture
def models(small_net, monkeypatch):
    """A Segmenter, a ViT and a rotary one, of 16 patches; none may pack."""

    def refuse(self, x):
        raise AssertionError("packed")

    monkeypatch.setattr(Packed, "lay", refuse)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    names = ("vit_tiny_patch16_224", "vit_small_patch16_dinov3")
    return [create_segmenter(small_net).eval(), *(timm.create_model(name, **size).eval() for name in names)]


@torch.inference_mode()
def test_every_image_keeps_exactly_so_many(models):
    for model in models:
        for method, options, left in BUDGETS:
            for mode in (False, True):
                patch.apply(model.train(mode), method, attention="proportional", **options)
                images = different_images(3)
                together = model(images)
                steps = list(patch.reductions(model).values())
                assert [step.lengths for step in steps] == [(n, n, n) for n in left], (method, options)
                assert all(step.padding is None for step in steps)
                for step, n in zip(steps, left, strict=True):
                    assert all(len(image.unique()) == n for image in step.assignment)
                    assert step.sizes.sum(1).tolist() == [16] * 3
                alone = torch.cat([model(image[None]) for image in images])
                torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
                patch.remove(model)
        model.eval()


@torch.inference_mode()
def test_the_budget_of_a_threshold_gives_its_partition(models):
    """Of one image and of several that keep equally many; an image of one color has equal tokens."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    distilled = timm.create_model("deit_tiny_distilled_patch16_224", dynamic_img_size=True, **size).eval()
    for model in (models[0], models[2], distilled):
        for images in (
            torch.randn(1, 3, 32, 32),
            torch.cat([different_images(2), torch.ones(1, 3, 32, 32)]),
            different_images(3)[:, :, :24, :24],
        ):
            for method, options in (
                ("graph", {"threshold": 0.2}),
                ("graph", {"threshold": 0.6, "layers": [1]}),
                ("algm", {"threshold": 0.1, "layers": [1]}),
                ("algm", {"threshold": 0.1, "layers": [1, 3]}),
                ("algm", {"threshold": 0.1, "layers": [1, 2, 3], "gbm_threshold": 0.4}),
                ("algm", {"window": (0, 0), "layers": [2], "gbm_threshold": -1.0}),
            ):
                patch.apply(model, method, batch="uniform", **options)
                expected, reduction = model(images), patch.reduction(model)
                tokens = [step.lengths[0] for step in patch.reductions(model).values()]
                patch.remove(model)
                patch.apply(model, method, tokens=tokens, **options)
                torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
                assert torch.equal(patch.reduction(model).assignment, reduction.assignment), (method, options)
                patch.remove(model)


FIXED = (
    ("graph", {"tokens": 7, "backend": "torch"}),
    ("algm", {"tokens": [9, 6], "layers": [1, 3]}),
    ("tome", {"r": 3}),
    ("tofu", {"r": 3}),
    ("dct", {"r": 3}),
    ("dtem", {"r": 3}),
)
BY_THE_IMAGE = (
    ("graph", {"threshold": 0.2, "backend": "torch"}),
    ("algm", {"layers": [1]}),
    ("algm", {"layers": [3], "window": (0, 0)}),
    ("mpm", {"layers": [2]}),
)


def patched(model, method, options):
    if not patch.has_modules(getattr(model, "encoder", model), method):
        with_parts(getattr(model, "encoder", model), method)
    return patch.apply(model, method, attention="proportional", **options)


@torch.inference_mode()
def test_nothing_is_read_back_from_the_device(models):
    for model, (method, options) in itertools.product(models, (*FIXED, *BY_THE_IMAGE)):
        patched(model, method, options | ({} if (method, options) in FIXED else {"batch": "uniform"}))
        with Waits() as waits, Reads() as reads:
            model(different_images(3))
        assert (reads.count, waits.count) == (int((method, options) in BY_THE_IMAGE), 0), (method, options)
        patch.remove(model)


@pytest.mark.nightly
@torch.inference_mode()
def test_tensors_without_values_are_enough(models):
    """Of a device that is not there: the way of tensors on a GPU."""
    for model, (method, options) in itertools.product(models, (*FIXED, *BY_THE_IMAGE)):
        patched(model.train(method in ("dtem", "algm")), method, options)
        encoder = getattr(model, "encoder", model)
        handle = encoder.blocks[0].register_forward_hook(lambda *_: None)  # keys are formed: fakes cannot be masks
        with FakeTensorMode():
            tensors = (*model.named_parameters(), *model.named_buffers())
            state = {name: torch.empty(x.shape, device="cuda") for name, x in tensors}
            call = partial(torch.func.functional_call, model, state, torch.randn(3, 3, 32, 32, device="cuda"))
            if (method, options) in FIXED:
                assert call().device.type == "cuda"
            else:  # so the others could have failed
                with pytest.raises(DataDependentOutputException):
                    call()
        handle.remove()
        patch.remove(model)


@torch.inference_mode()
def test_a_share_follows_the_grid(small_net):
    model = patch.apply(create_segmenter(small_net).eval(), "graph", tokens=0.25)
    for size, left in (((32, 32), 4), ((64, 32), 8), ((24, 24), 2)):
        model(torch.randn(2, 3, *size))
        assert patch.reduction(model).lengths == (left, left)
    patch.apply(patch.remove(model), "graph", tokens=10)
    with pytest.raises(ValueError, match="from 1 to 9"):
        model(torch.randn(2, 3, 24, 24))


def test_gradients_pass(models):
    for model in models:
        patch.apply(model.train(), "algm", tokens=[9, 6], layers=[1, 3], attention="proportional")
        model(torch.randn(2, 3, 32, 32)).square().sum().backward()
        assert all(block.attn.proj.weight.grad.any() for block in getattr(model, "encoder", model).blocks)


@torch.inference_mode()
def test_budgets_that_cannot_be_are_refused(models):
    refused = [
        ("graph", {"tokens": 0}, "tokens 0"),
        ("graph", {"tokens": 17}, "1 to 16"),
        ("graph", {"tokens": 1.5}, "share"),
        ("graph", {"tokens": -1}, "from 0"),
        ("graph", {"tokens": True}, "tokens True"),
        ("graph", {"tokens": "all"}, "tokens 'all'"),
        ("graph", {"tokens": [8, 4]}, "one for each of the 1 merging layers"),
        ("graph", {"tokens": []}, "tokens"),
        ("algm", {"tokens": [8], "layers": [1, 2]}, "2 merging layers"),
        ("tome", {"tokens": 8}, "takes no tokens"),
    ]
    unreachable = [
        ("algm", {"tokens": 3, "layers": [1]}, "tokens 3.* 4 to 16"),
        ("algm", {"tokens": [9, 3], "layers": [1, 2]}, "tokens 3.*5 to 9"),
        ("algm", {"tokens": [9, 10], "layers": [1, 2]}, "tokens 10.*5 to 9"),
    ]
    for model in models:
        for method, options, allowed in refused:
            with pytest.raises(ValueError, match=allowed):
                patch.apply(model, method, **options)
            assert not patch.is_patched(model)
        for method, options, allowed in unreachable:
            patch.apply(model, method, **options)
            with pytest.raises(ValueError, match=allowed) as caught:
                model(torch.randn(1, 3, 32, 32))
            assert "\n" not in str(caught.value)
            patch.remove(model)
