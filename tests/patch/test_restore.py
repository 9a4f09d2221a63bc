"""`restore="soft"` of every method that groups."""

import pytest
import torch

import patch
from g2tm import SoftRestored
from patch.method import METHODS
from segm.model.factory import create_segmenter
from tests.families import FAMILIES
from tests.helpers import METHOD_OPTIONS, STATIC_OPTIONS, by_speed, different_images, with_parts

OWN = {"dct", "clustvit", "expedit"}  # methods with a way back of their own


def test_methods_with_a_way_back_of_their_own_refuse():
    for name, method in METHODS.items():
        assert method.takes("restore") == (name not in OWN)
    with pytest.raises(ValueError, match="dct takes no restore: its options are"):
        patch.check("dct", 12, (4, 4), restore="soft")
    with pytest.raises(ValueError, match="restore 'learned': choose copy or soft"):
        patch.check("tome", 12, (4, 4), restore="learned")


@torch.inference_mode()
def test_a_batch_is_its_images_and_the_patch_is_taken_away(small_net):
    images = different_images(3)
    for name in METHODS.keys() - OWN:
        model = create_segmenter(small_net).eval()
        with_parts(model.encoder, name)
        plain = model(images)
        patch.apply(model, name, **METHOD_OPTIONS[name])
        copied = model(images)
        patch.apply(patch.remove(model), name, restore="soft", **METHOD_OPTIONS[name])
        together = model(images)
        assert not torch.equal(together, copied)
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5, msg=name)
        assert torch.equal(patch.remove(model)(images), plain)


@torch.inference_mode()
def test_every_layer_keeps_its_way_back(small_net):
    model = patch.apply(create_segmenter(small_net).eval(), "tome", r=3, restore="soft")
    model(different_images(2))
    total = patch.reduction(model)
    assert isinstance(total.second, SoftRestored) and isinstance(total.first.second, SoftRestored)
    torch.testing.assert_close(total.unmerge(torch.ones(2, 7, 3)), torch.ones(2, 16, 3))


@pytest.mark.parametrize("kind", by_speed(["Dinov2", "eva", "mmseg"], quick=["eva"], slow=["Dinov2"]))
@torch.inference_mode()
def test_families(kind):
    family, images = FAMILIES[kind], different_images(2)
    for name in ("graph", "tome", "cubist"):
        model = patch.apply(family.build(), name, restore="soft", **METHOD_OPTIONS[name])
        together = family.run(model, images)
        alone = torch.cat([family.run(model, image[None]) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_one_graph(small_net):
    images = different_images(2)
    for name in ("tome", "cubist"):
        model = patch.apply(create_segmenter(small_net).eval(), name, restore="soft", **STATIC_OPTIONS[name])
        with torch.no_grad():
            expected = model(images)
            compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
            exported = torch.export.export(model, (images,)).module()(images)
        torch.testing.assert_close(compiled, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(exported, expected, atol=1e-5, rtol=1e-5)


def test_it_trains(small_net):
    images = different_images(2).requires_grad_()
    model = patch.apply(create_segmenter(small_net).train(), "tome", r=2, restore="soft")
    (gradient,) = torch.autograd.grad(model(images).square().sum(), images)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
