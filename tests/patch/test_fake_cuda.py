"""On fake CUDA tensors: shapes and devices as on a GPU, without one. What is static neither waits nor copies."""

from functools import cache
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import patch
from tests.families import FAMILIES
from tests.helpers import METHOD_OPTIONS, STATIC_OPTIONS, Copies, Reads, Waits, by_speed, different_images

SETTINGS = {name: options for name, options in STATIC_OPTIONS.items() if name != "atc"}  # ATC leaves PyTorch
SETTINGS |= {
    "diffrate, r": {"r": 2},
    "fpet, adapter": {"adapter": True},
    "ltmp, learned": {"learned": True, "tokens": 9},
    "random, tokens": {"tokens": 9},
}
KINDS = ("vit", "eva", "Dinov2", "DINOv3ViT", "segmenter", "mask transformer")
QUICK, SLOW = (("vit", "graph"), ("eva", "tome")), (("Dinov2", "graph"), ("mask transformer", "ltmp"))
MODE = FakeTensorMode()  # one for all: transformers keep positions from one pass to the next
PRECISIONS = ("float32", "bfloat16", "autocast")


@pytest.fixture(autouse=True)
def gpu():
    """Lets autocast and its like believe in a GPU of compute capability 9.0."""
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        mock.patch("torch.cuda.get_device_capability", lambda *_: (9, 0)),
    ):
        yield


def moved(model, dtype):
    """The model with parameters and buffers on the fake device; called in a FakeTensorMode."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                new = torch.empty(
                    tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device="cuda"
                )
                tensors[name] = nn.Parameter(new, tensor.requires_grad) if tensors is module._parameters else new
    return model


def run_on_fake_gpu(kind, model, precision, training=False):
    """(output, what copied, how many reads, how many waits) of the second pass of a model."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    with MODE:
        moved(model, dtype).train(training)
        images = torch.empty(3, 3, 32, 32, device="cuda", dtype=dtype)
        with torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"):
            FAMILIES[kind].run(model, images)
            with Copies() as copies, Waits() as waits, Reads() as reads:
                output = FAMILIES[kind].run(model, images)
    return output, copies.names, reads.count, waits.count


def build(kind, setting, **options):
    """A patched model, with learned parts where its family can take them."""
    family, method, options = FAMILIES[kind], setting.split(",")[0], SETTINGS[setting] | options
    if method not in family.methods or ({"learned", "adapter"} & options.keys() and not family.learns):
        pytest.skip(f"{kind} cannot take {setting}")
    model = family.build()
    if family.learns:
        patch.add_modules(getattr(model, "encoder", model), method)
    return patch.apply(model, method, **options)


@cache
def copies_of_its_own(kind, precision):
    """Those of the unpatched model, such as timm's of rotary positions."""
    return run_on_fake_gpu(kind, FAMILIES[kind].build(), precision)[1]


def cases(settings):
    """By day, some methods on some kinds of models."""
    pairs = [(kind, setting) for kind in KINDS for setting in settings]
    return by_speed(pairs, [pair for pair in QUICK if pair in pairs], [pair for pair in SLOW if pair in pairs])


@pytest.mark.parametrize(("kind", "setting"), cases(SETTINGS))
def test_what_is_static_neither_waits_nor_copies(kind, setting):
    for precision, attention in (("float32", "none"), ("bfloat16", "proportional"), ("autocast", "proportional")):
        model = build(kind, setting, attention=attention)
        expected = FAMILIES[kind].run(model, different_images(3))
        lengths = patch.reduction(model).lengths
        output, copies, reads, waits = run_on_fake_gpu(kind, model, precision)
        assert output.device.type == "cuda" and output.shape == expected.shape, (precision, attention)
        assert output.dtype == torch.bfloat16 or precision != "bfloat16"
        with MODE:
            assert patch.reduction(model).lengths == lengths
            assert patch.reduction(model).sizes.device.type == "cuda"
        own = copies_of_its_own(kind, precision)  # once more for the rotary positions of a smaller grid
        smaller = getattr(patch.reduction(model), "grid", None) is not None
        assert copies == own or (smaller and copies == 2 * own), (precision, attention)
        assert (reads, waits) == (0, 0), (precision, attention)


@pytest.mark.parametrize(("kind", "setting"), cases(["dtem", "fpet, adapter", "graph", "tome", "dct", "random"]))
def test_nor_does_its_training(kind, setting):
    for precision in ("float32", "autocast"):
        model = build(kind, setting)
        output, copies, reads, waits = run_on_fake_gpu(kind, model, precision, training=True)
        assert output.device.type == "cuda" and output.requires_grad
        assert copies == copies_of_its_own(kind, precision) and (reads, waits) == (0, 0), precision


@pytest.mark.parametrize("kind", ["vit", "eva"])
@pytest.mark.parametrize("method", ["graph", "algm", "mpm", "ltmp"])
def test_a_threshold_waits_for_the_numbers_alone(kind, method):
    """It has to ask the device how many tokens are left; up to there no devices are mixed."""
    model = patch.apply(FAMILIES[kind].build(), method, **METHOD_OPTIONS[method])
    for precision in PRECISIONS:
        with Copies() as copies, pytest.raises(DataDependentOutputException):
            run_on_fake_gpu(kind, model, precision)
        assert set(copies.names) <= {"_to_copy"}


@torch.no_grad()  # of tensors that are made in inference mode nobody counts the changes
@pytest.mark.parametrize("kind", ["vit", "mask transformer"])
def test_learned_numbers_are_read_once(kind):
    """They are shapes: asked for in the first pass, and again after they have changed."""
    family, images = FAMILIES[kind], different_images(2)

    def learned(seed):
        model = family.build()
        encoder = getattr(model, "encoder", model)
        patch.add_modules(encoder, "diffrate", granularity=1)
        torch.manual_seed(seed)
        for parameter in patch.learned_parameters(encoder, "diffrate"):
            parameter.normal_(0, 2.0)
        return patch.apply(model, "diffrate", learned=True, granularity=1)

    models = [learned(seed) for seed in (1, 2)]
    expected = [(family.run(model, images), patch.reduction(model).lengths) for model in models]
    assert expected[0][1] != expected[1][1]
    with Reads() as reads, Waits() as waits:
        again = family.run(models[0], images)
    torch.testing.assert_close(again, expected[0][0])
    assert (reads.count, waits.count) == (0, 0)
    models[0].load_state_dict(models[1].state_dict())
    torch.testing.assert_close(family.run(models[0], images), expected[1][0])
    assert patch.reduction(models[0]).lengths == expected[1][1]


def test_copies_are_counted():
    with MODE, Copies() as copies:
        x = torch.zeros(3, device="cuda")
        x + 1.0
        x * torch.tensor(2.0)  # a number
        assert copies.names == []
        torch.zeros(3).to("cuda")
        torch.tensor([1.0], device="cuda")
        x.cpu()
        torch.zeros(3).copy_(x)
    assert copies.names == ["_to_copy"] * 3 + ["copy_"]
