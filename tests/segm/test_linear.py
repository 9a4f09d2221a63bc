"""Linear layers that PyTorch hands to another library."""

import copy

import pytest
import torch
from torch import nn

import patch
from segm.model import linear
from segm.model.factory import create_segmenter

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="PyTorch was built without oneDNN"
)


@pytest.fixture
def held_back(monkeypatch):
    monkeypatch.setattr(linear, "mkl_lacks_avx512", lambda: True)


def by_onednn(call, *args):
    """How many linear layers it computes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        call(*args)
    return sum(event.count for event in profiler.key_averages() if event.key == "mkldnn::_linear_pointwise")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (1, 24), (1000, 24), (2, 7, 24), (2, 3, 4, 24), (0, 24)])
def test_the_same_numbers(held_back, shape, bias):
    torch.manual_seed(0)
    one, x = nn.Linear(24, 10, bias=bias), torch.randn(shape)
    other = linear.use_onednn_linear(copy.deepcopy(one))
    for without_gradients in (torch.no_grad(), torch.inference_mode()):
        with without_gradients:
            torch.testing.assert_close(other(x), one(x))
            assert (by_onednn(one, x), by_onednn(other, x)) == (0, int(x.numel() > 0))


@torch.inference_mode()
@pytest.mark.parametrize("strided", [lambda x: x.mT, lambda x: x[..., ::2], lambda x: x.transpose(0, 1)])
def test_any_strides(held_back, strided):
    x = strided(torch.randn(24, 24, 24))
    one = nn.Linear(x.shape[-1], 5)
    torch.testing.assert_close(linear.use_onednn_linear(copy.deepcopy(one))(x), one(x))


def test_gradients_are_those_of_a_linear_layer(held_back):
    one, x = nn.Linear(24, 10), torch.randn(2, 7, 24)
    other = linear.use_onednn_linear(copy.deepcopy(one))
    for layer in (one, other):
        layer(x).square().sum().backward()
    assert torch.equal(one.weight.grad, other.weight.grad)


def test_what_it_is_not_for_stays_a_linear_layer(held_back):
    layer, x = linear.use_onednn_linear(nn.Linear(24, 10)), torch.randn(2, 7, 24)
    with torch.inference_mode(), torch.autocast("cpu"):
        assert layer(x).dtype == torch.bfloat16
        assert by_onednn(layer, x) == 0
    with torch.no_grad():
        assert by_onednn(copy.deepcopy(layer).double(), x.double()) == 0
        traced = torch.jit.trace(layer, x)
        exported = torch.export.export(layer, (x,))
    assert "aten::linear" in str(traced.inlined_graph)
    assert [node.target for node in exported.graph.nodes if node.op == "call_function"] == [
        torch.ops.aten.linear.default
    ]


def test_a_model_keeps_its_names_and_its_subclasses(held_back):
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(3, 4), Own(4, 5))
    names = list(model.state_dict())
    linear.use_onednn_linear(model)
    assert list(model.state_dict()) == names
    assert [type(module) for module in model] == [linear.OneDNNLinear, Own]
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
    monkeypatch.setattr(linear, "processor_name", lambda: name)
    assert linear.mkl_lacks_avx512() is expected
    kind = linear.OneDNNLinear if expected else nn.Linear
    assert type(linear.use_onednn_linear(nn.Linear(2, 2))) is kind


@pytest.mark.parametrize(("method", "options"), [(None, {}), ("graph", {}), ("algm", {"layers": [1, 2]}), ("tome", {})])
def test_a_segmenter_gives_the_same(monkeypatch, small_net, method, options):
    torch.manual_seed(0)
    monkeypatch.setattr(linear, "mkl_lacks_avx512", lambda: False)
    one = create_segmenter(small_net).eval()
    monkeypatch.setattr(linear, "mkl_lacks_avx512", lambda: True)
    other = create_segmenter(small_net).eval()
    other.load_state_dict(one.state_dict())
    images = torch.randn(2, 3, 64, 64)
    for model in (one, other):
        if method is not None:
            patch.apply(model, method, **options)
    with torch.inference_mode():
        torch.testing.assert_close(other(images), one(images), rtol=1e-5, atol=1e-5)
        assert by_onednn(other, images) > by_onednn(one, images) == 0
