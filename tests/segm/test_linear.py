"""Linear layers that PyTorch hands to another library."""

import copy

import pytest
import torch
from torch import nn

import patch
from segm.eval.comparison import eager_label_map
from segm.model import linear
from segm.model.factory import create_segmenter


@pytest.fixture
def held_back(monkeypatch):
    monkeypatch.setattr(linear, "is_held_back", lambda: True)


def by_onednn(call, *args):
    """How many convolutions it computes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call(*args)
    return sum(event.count for event in profiler.key_averages() if event.key == "aten::mkldnn_convolution")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shape", "convolves"),
    [
        ((1000, 24), True),
        ((2, 500, 24), True),
        ((2, 5, 100, 24), True),
        ((1, 30000), True),
        ((24,), False),
        ((2, 7, 24), False),
        ((0, 24), False),
    ],
)
def test_the_same_numbers_and_gradients(held_back, shape, convolves, bias):
    torch.manual_seed(0)
    one = nn.Linear(shape[-1], 10, bias=bias)
    other = linear.use_whole_processor(copy.deepcopy(one))
    results = []
    for layer in (one, other):
        x = torch.linspace(-2, 3, torch.Size(shape).numel()).view(shape).requires_grad_()
        y = layer(x)
        y.mean().backward()
        results.append([y, x.grad, *(parameter.grad for parameter in layer.parameters())])
    torch.testing.assert_close(*results)
    assert (by_onednn(one, x), by_onednn(other, x)) == (0, int(convolves))


@pytest.mark.parametrize("strided", [lambda x: x.mT, lambda x: x[..., ::2], lambda x: x.transpose(0, 1)])
def test_any_strides(held_back, strided):
    x = strided(torch.randn(40, 40, 40))
    one = nn.Linear(x.shape[-1], 5)
    torch.testing.assert_close(linear.use_whole_processor(copy.deepcopy(one))(x), one(x))


def test_what_it_is_not_for_stays_a_linear_layer(held_back):
    layer, x = linear.use_whole_processor(nn.Linear(24, 10)), torch.randn(2, 500, 24)
    with torch.autocast("cpu"):
        assert layer(x).dtype == torch.bfloat16
        assert by_onednn(layer, x) == 0
    assert by_onednn(copy.deepcopy(layer).double(), x.double()) == 0
    traced = torch.jit.trace(layer, x)
    assert "aten::linear" in str(traced.inlined_graph)
    exported = torch.export.export(layer, (x,))
    assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.linear.default
    ]


def test_a_model_keeps_its_names_and_its_subclasses(held_back):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(3, 4), Own(4, 5))
    names = list(model.state_dict())
    linear.use_whole_processor(model)
    assert list(model.state_dict()) == names
    assert [type(module) for module in model] == [linear.ConvolvedLinear, Own]
    assert [type(module) for module in linear.restore_linear(model)] == [nn.Linear, Own]


@pytest.mark.parametrize(
    ("capability", "name", "expected"),
    [
        ("AVX512", "AMD EPYC 9R14", True),
        ("AVX2", "AMD EPYC 7R13", False),
        ("AVX512", "Intel(R) Xeon(R) Processor", False),
        ("DEFAULT", "Apple M2", False),
    ],
)
def test_only_processors_that_are_held_back(monkeypatch, capability, name, expected):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(linear, "processor_name", lambda: name)
    assert linear.is_held_back() is expected
    kind = linear.ConvolvedLinear if expected else nn.Linear
    assert type(linear.use_whole_processor(nn.Linear(2, 2))) is kind


@pytest.mark.parametrize(("method", "options"), [(None, {}), ("graph", {}), ("algm", {"layers": [1, 2]}), ("tome", {})])
def test_a_segmenter_gives_the_same(monkeypatch, small_net, method, options):
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "is_held_back", lambda: False)
    one = create_segmenter(small_net).eval()
    monkeypatch.setattr(linear, "is_held_back", lambda: True)
    other = create_segmenter(small_net).eval()
    other.load_state_dict(one.state_dict())
    images = torch.randn(2, 3, 256, 256)
    for model in (one, other):
        if method is not None:
            patch.apply(model, method, **options)
    with torch.inference_mode():
        torch.testing.assert_close(other(images), one(images), rtol=1e-5, atol=1e-5)
        assert by_onednn(other, images) > by_onednn(one, images) == 1


@torch.inference_mode()
def test_the_eager_label_map_has_pytorchs_layers(held_back, small_net):
    model, images = create_segmenter(small_net).eval(), torch.randn(2, 3, 256, 256)
    assert by_onednn(model.predict, images) > by_onednn(eager_label_map(model), images) == 1
