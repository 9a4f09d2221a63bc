"""Operations, one per multiply-add."""

import pytest
import torch

import patch
from patch.operations import count_operations
from segm.model.factory import create_segmenter
from tests.helpers import by_speed


@pytest.mark.parametrize(
    ("size", "pixels", "n_cls", "published"),
    by_speed(
        [
            ("tiny", 512, 150, 12.8),
            ("small", 512, 150, 38.6),
            ("base", 512, 150, 129.6),
            ("small", 768, 19, 116),
            ("large", 512, 150, 400.1),
            ("small", 1024, 19, 285),
            ("base", 1024, 19, 776),
        ],
        quick=[("tiny", 512, 150, 12.8)],
        slow=[("small", 768, 19, 116)],
    ),
)
def test_operations_are_the_published_ones(size, pixels, n_cls, published):
    net = {"backbone": f"vit_{size}_patch16_384", "image_size": pixels, "n_cls": n_cls}
    with torch.device("meta"):
        model = create_segmenter(net | {"decoder": {"name": "mask_transformer"}}).eval()
        operations = count_operations(model, torch.zeros(1, 3, pixels, pixels))
    assert operations.total == pytest.approx(published, rel=0.02)


def test_a_count_on_the_meta_device_is_that_on_the_cpu(small_net):
    images, model = torch.randn(2, 3, 36, 32), patch.apply(create_segmenter(small_net).eval(), "tome", r=2)
    on_cpu = count_operations(model, images)
    on_meta = count_operations(model.to("meta"), images.to("meta"))
    assert (on_meta.total, on_meta.encoder, on_meta.decoder) == (on_cpu.total, on_cpu.encoder, on_cpu.decoder)


def test_the_count_is_per_image(small_net):
    model, images = create_segmenter(small_net).eval(), torch.randn(2, 3, 32, 32)
    assert count_operations(model, images).total == pytest.approx(count_operations(model, images[:1]).total, rel=1e-9)


@pytest.mark.parametrize(("method", "options"), [("graph", {"threshold": 0.2}), ("algm", {"layers": [1, 3]})])
def test_a_batch_counts_as_its_images_alone(small_net, method, options):
    """Images that keep different numbers of tokens cost what they cost alone: on padding, only the norm behind the
    blocks is computed, and in a second merge similarities."""
    model = patch.apply(create_segmenter(small_net).eval(), method, **({"threshold": 0.1} | options))
    images = torch.randn(3, 3, 32, 32) * torch.tensor([0.2, 1.0, 3.0]).view(3, 1, 1, 1)
    model.grid_logits(images)
    assert patch.reduction(model).padding is not None
    together, alone = count_operations(model, images), [count_operations(model, image[None]) for image in images]
    assert together.encoder == pytest.approx(sum(one.encoder for one in alone) / 3, rel=3e-3)


def test_attention_counts_as_its_two_products(small_net):
    """Against a count by hand of one block: 4 + 8 products of width², and two of L²."""
    model = create_segmenter(small_net).eval()
    one, two = (
        count_operations(create_segmenter(small_net | {"n_layers": n}).eval(), torch.randn(1, 3, 32, 32))
        for n in (1, 2)
    )
    length, width = 17, model.encoder.embed_dim
    norms = 2 * 5 * length * width  # 5 per number of a layer norm, as fvcore counts
    by_hand = 12 * length * width**2 + 2 * length**2 * width + norms
    assert (two.encoder - one.encoder) * 1e9 == pytest.approx(by_hand)


@pytest.mark.parametrize(
    ("method", "options", "added"),
    [
        # A 4x4 grid of width 32: 24 pairs of neighbors and 16 norms; 16 tokens are summed, and their sizes.
        ("graph", {"layers": [1], "threshold": 1.0}, (24 + 16) * 32 + 16 * 32 + 16),
        # The same sums; squared lengths of 16 unit vectors and of the sums over 4 windows.
        ("algm", {"layers": [1], "threshold": 1.0}, 16 * 32 + 16 + (16 + 4) * 32),
        # 8 patches at even and 8 at odd positions, keys of width 16, in each of 3 layers; sizes are summed in each, and
        # twice more where a step is composed with those before it.
        ("tome", {"r": 0}, 3 * (8 * 8 * 16 + 16 * 32 + 16) + 2 * 16),
    ],
)
def test_nothing_of_the_merge_is_missed(small_net, method, options, added):
    """Where nothing merges, what the method computes comes on top of the plain model."""
    model, images = create_segmenter(small_net).eval(), torch.randn(1, 3, 32, 32)
    plain = count_operations(model, images)
    patch.apply(model, method, attention="none", **options)
    merging = count_operations(model, images)
    assert (merging.total - plain.total) * 1e9 == pytest.approx(added)
    sizes = 16e-9  # of the composed step, where it is undone
    assert merging.decoder == pytest.approx(plain.decoder, abs=1.01 * sizes)


def test_merging_saves_operations_and_what_is_not_counted_is_named(small_net):
    model, images = create_segmenter(small_net).eval(), torch.randn(1, 3, 32, 32)
    plain = count_operations(model, images)
    patch.apply(model, "graph", layers=[1], threshold=-1.0)
    merging = count_operations(model, images)
    assert merging.encoder < plain.encoder and merging.decoder < plain.decoder
    assert plain.uncounted["gelu"] == 4 and "index_select" in merging.uncounted
    assert not {"scaled_dot_product_attention", "linalg_vecdot", "index_add"} & set(merging.uncounted)
