"""The bias of merged tokens as channels of queries and keys."""

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import patch
from g2tm import attention_bias
from patch import layout
from patch.attention import SizeBias, bias_in_channels, key_channels
from segm.model.factory import create_segmenter

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 5e-4}
WIDTHS = (64, 32, 80, 20)


class Channels(TorchFunctionMode):
    """Counts the attentions that take the bias through channels."""

    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += isinstance((kwargs or {}).get("attn_mask"), SizeBias)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def through_channels(monkeypatch):
    """As on a GPU in half precision."""
    monkeypatch.setattr(layout, "bias_in_channels", lambda x: True)


def in_rows(model):
    """The model with a hook that changes nothing: images are padded, as where packed sequences have no kernel."""
    model.encoder.blocks[0].register_forward_hook(lambda *_: None)
    return model


def attention_case(width, dtype=torch.float32, mode="proportional"):
    """Queries, keys, values (2, 3, 40, width), and the bias (2, 1, 1, 40) of sizes up to 900 with padding."""
    sizes = torch.randint(1, 900, (2, 40)).float()
    sizes[1, 30:] = 0
    return torch.randn(3, 2, 3, 40, width).to(dtype).unbind(0), attention_bias(sizes, mode, sizes == 0)


@pytest.mark.parametrize("mode", ["none", "proportional", "inverse"])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", WIDTHS)
def test_attention_is_that_with_the_additive_bias(width, dtype, mode):
    qkv, bias = attention_case(width, dtype, mode)
    expected = F.scaled_dot_product_attention(*(x.double() for x in qkv), attn_mask=bias.double())
    found = F.scaled_dot_product_attention(*qkv, attn_mask=SizeBias(bias))
    assert found.dtype == dtype and type(found) is torch.Tensor
    torch.testing.assert_close(found.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_nearer_than_an_additive_bias(dtype):
    qkv, bias = attention_case(64, dtype)
    expected = F.scaled_dot_product_attention(*(x.double() for x in qkv), attn_mask=bias.double())
    error = [
        (F.scaled_dot_product_attention(*qkv, attn_mask=mask).double() - expected).abs().max()
        for mask in (SizeBias(bias), bias.to(dtype))
    ]
    assert error[0] < error[1] / 2


def test_a_bias_is_split_into_what_rounding_keeps_and_what_it_leaves():
    bias = torch.log(torch.arange(1.0, 1025.0)).view(1, 1, 1, -1)
    for dtype, relative in ((torch.float32, 2**-24), (torch.bfloat16, 2**-17), (torch.float16, 2**-22)):
        error = (key_channels(bias, 0.125, dtype).double().sum(-1) * 0.125 - bias[0, 0].double()).abs()
        assert (error <= relative * bias[0, 0].double() + 1e-7).all()


@pytest.mark.parametrize("width", WIDTHS)
def test_padding_has_no_weight_and_no_gradient(width):
    (q, k, v), bias = attention_case(width)
    v[1, :, 30:] = 1e6
    k, v = k.requires_grad_(), v.requires_grad_()
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=SizeBias(bias))
    assert found.abs().max() < 100
    found.square().sum().backward()
    assert not k.grad[1, :, 30:].any() and not v.grad[1, :, 30:].any()


def test_gradients_are_those_with_the_additive_bias():
    qkv, bias = attention_case(32)
    gradients = []
    for mask in (bias, SizeBias(bias)):
        inputs = [x.clone().requires_grad_() for x in qkv]
        F.scaled_dot_product_attention(*inputs, attn_mask=mask).square().sum().backward()
        gradients.append([x.grad for x in inputs])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_elsewhere_it_is_refused():
    """An explicit attention that is handed such a mask must not add it in some way of its own."""
    bias = torch.randn(2, 1, 1, 5)
    with pytest.raises(TypeError):
        torch.zeros(2, 3, 5, 5) + SizeBias(bias)
    with pytest.raises(TypeError):
        torch.cat([SizeBias(bias), bias])


@pytest.mark.parametrize("attention", ["none", "proportional", "inverse"])
@pytest.mark.parametrize(("method", "options"), [("graph", {"threshold": 0.2}), ("tome", {"r": 2})])
@torch.inference_mode()
def test_a_model_gives_the_same_either_way(small_net, monkeypatch, through_channels, method, options, attention):
    """Prefix tokens in the encoder, class tokens in the decoder, padding in a ragged batch."""
    model = create_segmenter(small_net).eval()
    patch.apply(in_rows(model), method, attention=attention, **options)
    images = torch.randn(3, 3, 32, 32) * torch.tensor([0.2, 1.0, 3.0]).view(3, 1, 1, 1)
    with Channels() as channels:
        found = model(images)
    assert channels.count == {"graph": 2, "tome": 1 if attention != "none" else 0}[method]  # a merge looks as well
    monkeypatch.undo()
    torch.testing.assert_close(found, model(images), atol=1e-5, rtol=1e-5)


def test_training_gives_the_same_gradients(small_net, monkeypatch, through_channels):
    model = patch.apply(in_rows(create_segmenter(small_net)), "graph", threshold=0.2, attention="proportional").train()
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for expected in (2, 0):
        model.zero_grad()
        with Channels() as channels:
            model(images).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert channels.count == expected
        monkeypatch.undo()
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_attention_weights_can_still_be_shown(small_net, through_channels, dtype):
    model = create_segmenter(small_net).eval().to(dtype)
    patch.apply(model, "graph", threshold=0.2, attention="proportional")
    with Channels() as channels:
        weights = model.attention(torch.randn(1, 3, 32, 32, dtype=dtype), 2)
    assert channels.count
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


@torch.inference_mode()
def test_explicit_attention_keeps_the_additive_bias(small_net, through_channels):
    model = create_segmenter(small_net).eval().bfloat16()
    patch.apply(model, "graph", threshold=0.2, attention="proportional")
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.attn.fused_attn = False
    with Channels() as channels:
        assert model(torch.randn(1, 3, 32, 32, dtype=torch.bfloat16)).isfinite().all()
    assert not channels.count


@torch.inference_mode()
def test_mixed_precision(small_net, through_channels):
    model = create_segmenter(small_net).eval()
    patch.apply(model, "graph", threshold=0.2, attention="proportional")
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(images).float(), expected, atol=0.1, rtol=0)


def test_the_cpu_keeps_the_additive_bias(small_net):
    assert not bias_in_channels(torch.ones(1, dtype=torch.bfloat16))
    with torch.device("meta"):
        assert not bias_in_channels(torch.ones(1))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 32, 80])
def test_flash_kernels_take_the_bias(width, dtype):
    qkv, bias = attention_case(width, dtype)
    assert bias_in_channels(qkv[0].cuda()) and not bias_in_channels(qkv[0].cuda().float())
    expected = F.scaled_dot_product_attention(*(x.double() for x in qkv), attn_mask=bias.double())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        found = F.scaled_dot_product_attention(*(x.cuda() for x in qkv), attn_mask=SizeBias(bias.cuda()))
    torch.testing.assert_close(found.cpu().double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
