"""Operations and speed."""

import pytest
import torch

import patch
from segm.eval.cost import count_gflops, images_per_second
from segm.model.factory import create_segmenter


@pytest.mark.parametrize(("size", "published"), [("tiny", 12.8), ("small", 38.6), ("base", 129.6)])
def test_gflops_are_the_published_ones(size, published):
    net = {"backbone": f"vit_{size}_patch16_384", "image_size": 512, "n_cls": 150}
    model = create_segmenter(net | {"decoder": {"name": "mask_transformer"}}).eval()
    assert count_gflops(model, torch.randn(1, 3, 512, 512)) == pytest.approx(published, rel=0.02)


def test_merging_saves_operations_and_the_count_is_per_image(small_net):
    model, images = create_segmenter(small_net).eval(), torch.randn(2, 3, 32, 32)
    plain = count_gflops(model, images)
    assert plain == pytest.approx(count_gflops(model, images[:1]), rel=1e-6)
    patch.segmenter(model, "graph", layers=[1], threshold=-1.0)
    assert count_gflops(model, images) < plain


def test_every_model_is_timed_on_every_batch():
    calls = {"a": [], "b": []}
    functions = {name: seen.append for name, seen in calls.items()}
    rates = images_per_second(
        functions, [torch.zeros(2, 1), torch.zeros(3, 1)], torch.device("cpu"), repeats=2, warmup=1
    )
    assert set(rates) == {"a", "b"} and all(rate > 0 for rate in rates.values())
    assert len(calls["a"]) == len(calls["b"]) == 1 + 2 * 2
