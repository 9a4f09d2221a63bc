"""Batches whose images keep different numbers of tokens, concatenated instead of padded."""

import copy
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F

import patch
from g2tm import Grouping
from patch import attention
from patch.attention import can_pack
from patch.layout import Packed, Tokens
from segm.model.factory import create_segmenter
from tests.helpers import Reads, Waits, different_images

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
SETTINGS = {
    "graph": {"threshold": 0.2},
    "graph proportional": {"threshold": 0.2, "attention": "proportional"},
    "graph inverse": {"threshold": 0.2, "attention": "inverse"},
    "algm": {"layers": [1, 3], "threshold": 0.1},
}


@pytest.fixture
def packed(monkeypatch):
    """Shapes of the padded batches that were packed."""
    shapes, original = [], Packed.lay

    def lay(self, x):
        shapes.append(tuple(x.shape[:2]))
        return original(self, x)

    monkeypatch.setattr(Packed, "lay", lay)
    return shapes


def look_inside(model):
    """A hook that changes nothing keeps images in rows; its handle."""
    return model.encoder.blocks[0].register_forward_hook(lambda *_: None)


def layout(reduction, before, after, attention="none"):
    return Packed(Tokens(reduction, (3, 4), attention), (before, after))


def patched(net, name, **more):
    return patch.apply(create_segmenter(net | more), name.split()[0], **SETTINGS[name])


def random_reduction(lengths, n_tokens=12):
    assignment = torch.stack([torch.arange(n_tokens) % length for length in lengths])
    return Grouping(assignment, torch.tensor(lengths), lengths)


@pytest.mark.parametrize("name", SETTINGS)
@torch.inference_mode()
def test_scores_are_those_of_padded_images_and_of_images_alone(small_net, packed, name):
    model, images = patched(small_net, name).eval(), different_images()
    found = model(images)
    assert len(packed) >= 2 and patch.reduction(model).padding is not None  # in the encoder, in the decoder
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(found, alone, **TOLERANCE)
    packed.clear()
    look_inside(model)
    torch.testing.assert_close(found, model(images), **TOLERANCE)
    assert not packed


@torch.inference_mode()
def test_a_linear_decoder_gets_its_tokens_in_rows(small_net, packed):
    model, images = patched(small_net, "graph", decoder={"name": "linear"}).eval(), different_images()
    torch.testing.assert_close(model(images), torch.cat([model(image[None]) for image in images]), **TOLERANCE)
    assert len(packed) == 1


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_training_gives_the_gradients_of_padded_images(small_net, packed, drop_path):
    """Stochastic depth draws the same numbers, and leaves out whole images either way."""
    model = patched(small_net, "graph proportional", drop_path_rate=drop_path).train()
    images, gradients = different_images(8), []
    for look in (False, True):
        if look:
            look_inside(model)
        model.zero_grad()
        torch.manual_seed(0)
        model(images).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert len(packed) == 2
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_stochastic_depth_leaves_out_whole_images():
    merged = layout(random_reduction([2, 5, 3]), 1, 0)
    drop_path = timm.layers.DropPath(0.5).train()
    kept = merged.rows(merged.drop(drop_path, merged.lay(torch.ones(3, 6, 4))))
    assert {image.unique().numel() for image in kept} == {1}
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    x = merged.lay(torch.randn(3, 6, 4))
    assert merged.drop(drop_path.eval(), x) is x


@torch.inference_mode()
def test_a_classifier_of_timm(packed):
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=3, num_classes=7).eval()
    patch.apply(vit, "graph", threshold=0.0, attention="proportional")
    images = torch.randn(3, 3, 64, 64) * torch.tensor([0.1, 1.0, 3.0]).view(3, 1, 1, 1)
    torch.testing.assert_close(vit(images), torch.cat([vit(image[None]) for image in images]), **TOLERANCE)
    assert len(packed) == 1


@torch.inference_mode()
def test_who_looks_inside_sees_images_in_rows(small_net, packed):
    model, images = patched(small_net, "graph").eval(), different_images()
    expected = model(images)
    packed.clear()
    weights = model.attention(images, 2)
    assert not packed and weights.shape[0] == 3
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    shapes = []
    handle = model.encoder.blocks[2].register_forward_hook(lambda block, inputs, output: shapes.append(output.shape))
    torch.testing.assert_close(model(images), expected, **TOLERANCE)
    handle.remove()
    assert shapes == [(3, 1 + patch.reduction(model).width, 32)] and not packed
    model(images)
    assert packed


@torch.inference_mode()
def test_blocks_that_cannot_work_on_packed_tokens_get_them_in_rows(small_net, packed):
    model, images = patched(small_net, "graph").eval(), different_images()
    expected = model(images)
    packed.clear()
    model.encoder.blocks[2].attn.fused_attn = False  # the merge is in the second
    model.decoder.blocks[0].attn.fused_attn = False
    torch.testing.assert_close(model(images), expected, **TOLERANCE)
    assert len(packed) == 1


@torch.inference_mode()
def test_equal_lengths_and_buckets_are_not_packed(small_net, packed):
    model = patch.apply(create_segmenter(small_net).eval(), "graph", threshold=0.2, batch="uniform")
    model(different_images())
    patch.remove(model)
    patch.apply(model, "tome", r=2)
    model(different_images())
    patch.remove(model)
    patch.compile(patch.apply(model, "graph", threshold=0.2), bucket=8, backend="eager")
    model(different_images())
    assert not packed


def test_who_looks_at_gradients_sees_images_in_rows(small_net):
    model, shapes = patched(small_net, "graph").train(), []
    model.encoder.blocks[2].register_full_backward_hook(lambda block, to, of: shapes.append(of[0].shape))
    model(different_images()).sum().backward()
    assert shapes == [(3, 1 + patch.reduction(model).width, 32)]


@torch.inference_mode()
def test_a_pass_that_fails_leaves_no_trace(small_net):
    model, images = patched(small_net, "graph").eval(), different_images()
    expected = model(images)
    mlp, model.encoder.blocks[2].mlp = model.encoder.blocks[2].mlp, torch.nn.Linear(1, 1)
    with pytest.raises(RuntimeError):
        model(images)
    model.encoder.blocks[2].mlp = mlp
    torch.testing.assert_close(copy.deepcopy(model)(images), expected, **TOLERANCE)
    torch.testing.assert_close(model(images), expected, **TOLERANCE)


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 0), (2, 3)])
def test_packing_and_unpacking(before, after):
    lengths = [3, 7, 1]
    reduction = random_reduction(lengths)
    with Waits() as waits, Reads() as reads:
        where = layout(reduction, before, after)
        starts = where.starts
    assert (reads.count, waits.count) == (0, 0)
    x = torch.randn(3, before + 7 + after, 4)
    packed = where.lay(x)
    expected = [torch.cat([row[: before + n], row[before + 7 :]]) for row, n in zip(x, lengths, strict=True)]
    assert torch.equal(packed[0], torch.cat(expected))
    assert starts.tolist() == [0, *torch.tensor([len(part) for part in expected]).cumsum(0)]
    assert starts.dtype == torch.int32
    back = where.rows(packed)
    kept = F.pad(~reduction.padding, (before, after), value=True)
    assert back.shape == x.shape and torch.equal(back[kept], x[kept])


def attention_case(width, dtype, biased):
    """Queries, keys, values (1, 2, T, width), the mask, and the result image by image in float64."""
    lengths = [5, 9, 2]
    where = layout(random_reduction(lengths), 1, 2, "proportional" if biased else "none")
    qkv = torch.randn(3, 1, 2, sum(lengths) + 9, width).to(dtype).unbind(0)
    sizes, expected = where.tokens.reduction.sizes, []
    for i, (start, end) in enumerate(pairwise(where.starts)):
        mask = F.pad(sizes[i, : lengths[i]].log(), (1, 2)).double()[None, None, None] if biased else None
        parts = (x[:, :, start:end].double() for x in qkv)
        expected.append(F.scaled_dot_product_attention(*parts, attn_mask=mask))
    return qkv, where.mask(qkv[0], fused=True), torch.cat(expected, 2)


@pytest.mark.parametrize("biased", [False, True])
def test_attention_stays_within_the_image(biased):
    qkv, where, expected = attention_case(16, torch.float32, biased)
    found = F.scaled_dot_product_attention(*qkv, attn_mask=where)
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found.double(), expected, **TOLERANCE)


def reference_varlen(query, key, value, starts_q, starts_k, longest_q, longest_k, *, scale):
    """What the kernel of the GPU computes, (T, H, d)."""
    assert torch.equal(starts_q, starts_k) and starts_q.dtype == torch.int32 and starts_q[-1] == len(query)
    assert longest_q == longest_k == (starts_q[1:] - starts_q[:-1]).max()
    assert query.shape == key.shape == value.shape and query.shape[-1] % 8 == 0
    bounds = starts_q.tolist()
    parts = [
        F.scaled_dot_product_attention(*(x[a:b].transpose(0, 1) for x in (query, key, value)), scale=scale)
        for a, b in pairwise(bounds)
    ]
    return torch.cat([part.transpose(0, 1) for part in parts])


@pytest.mark.parametrize("width", [64, 20])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_what_the_kernel_is_given(monkeypatch, width, biased, dtype, tolerance):
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: reference_varlen)
    qkv, where, expected = attention_case(width, dtype, biased)
    found = attention._in_one_kernel(*qkv, where, 0.0, width**-0.5)
    assert found.dtype == dtype and found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def test_the_kernel_is_given_one_dtype_and_one_width(monkeypatch):
    """Norms of queries and keys leave float32 under autocast; differential attention has values twice as wide."""
    monkeypatch.setattr(attention, "_varlen_kernel", lambda: reference_varlen)
    (query, key, value), where, _ = attention_case(32, torch.float32, biased=True)
    wide = torch.cat([value, value.flip(-1)], -1)
    expected = F.scaled_dot_product_attention(query, key, wide, attn_mask=where)
    found = attention._in_one_kernel(query, key, wide.bfloat16(), where, 0.0, 32**-0.5)
    assert found.dtype == torch.bfloat16 and found.shape == wide.shape
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)


def test_where_sequences_are_packed():
    assert can_pack(torch.ones(1)) and can_pack(torch.ones(1), dropout=0.1)
    with torch.device("meta"):
        assert not can_pack(torch.ones(1))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
@torch.inference_mode()
def test_cuda_packs_as_the_cpu_does(small_net, packed, name, dtype, tolerance):
    if not can_pack(torch.ones(1, dtype=dtype, device="cuda")):
        pytest.skip("needs torch.nn.attention.varlen and compute capability 8.0")
    net = small_net | {"d_model": 64, "n_heads": 2}
    model, images = patched(net, name).eval(), different_images()
    model.to(device="cuda", dtype=dtype)
    images = images.to(device="cuda", dtype=dtype)
    found = model(images).float()
    assert packed
    alone = torch.cat([model(image[None]).float() for image in images])
    torch.testing.assert_close(found, alone, atol=tolerance, rtol=tolerance)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_gradients_of_padded_images(small_net, packed):
    if not can_pack(torch.ones(1, dtype=torch.bfloat16, device="cuda")):
        pytest.skip("needs torch.nn.attention.varlen and compute capability 8.0")
    model = patched(small_net | {"d_model": 64, "n_heads": 2}, "graph proportional").train().cuda()
    images, gradients = different_images(8).cuda(), []
    for look in (False, True):
        if look:
            look_inside(model)
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            model(images).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert packed
    torch.testing.assert_close(*gradients, atol=0.05, rtol=0.1)
