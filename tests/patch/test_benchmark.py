"""Methods side by side: what `patch.benchmark` measures on ViTs and Segmenters, and what it refuses."""

import pytest
import timm
import torch

import patch
from patch.measure import untrained_methods
from patch.observe import features
from segm.model.factory import create_segmenter

SIZE = {"img_size": 32, "patch_size": 4, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
IMAGES = [torch.randn(2, 3, 32, 32) * scale for scale in (0.5, 2.0)]


@pytest.fixture
def vit():
    """A tiny ViT for 64 patches, whose features are apart."""
    model = timm.create_model("vit_tiny_patch16_224", **SIZE).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model


def test_methods_have_one_budget_and_leave_the_model_alone(vit):
    before, kind = vit.state_dict(), type(vit)
    methods = {"tome": ("tome", {}), "own": ("graph", {"threshold": 1}), "random": ("random", {}), "pure": ("pure", {})}
    rows = {row["name"]: row for row in patch.benchmark(vit, IMAGES, methods, tokens=0.5, repeats=1)}
    assert [*rows] == ["pure", "tome", "own", "random"] and type(vit) is kind and not patch.is_patched(vit)
    assert all(value is vit.state_dict()[name] or value.equal(before[name]) for name, value in vit.state_dict().items())
    assert rows["random"]["tokens"] == 32 and rows["tome"]["tokens"] == pytest.approx(32, abs=3)
    for name in ("pure", "own"):  # nothing merges above a similarity of 1
        assert rows[name]["tokens"] == 64 and rows[name]["agreement"] == 1
        assert rows[name]["cosine"] == pytest.approx([1] * 4, abs=1e-5)
    cosine = rows["random"]["cosine"]
    assert cosine[0] == pytest.approx(1) and all(value < 0.99 for value in cosine[1:])  # it merges in layer 2
    assert rows["tome"]["gflops"] < rows["pure"]["gflops"] and rows["pure"]["realized_share"] == 1
    speed = rows["tome"]["images_per_second"] / rows["pure"]["images_per_second"]
    assert rows["tome"]["realized_share"] > 0 and speed > 0
    assert rows["tome"]["options"]["r"] > 0 and rows["own"]["options"]["threshold"] == 1


@torch.inference_mode()
def test_features_have_all_patches_in_every_layer(vit):
    with features(vit) as plain:
        vit.forward_features(IMAGES[0])
    assert [*plain] == [1, 2, 3, 4] and not patch.is_patched(vit)
    patch.apply(vit, "graph", layers=[2], threshold=0.1)  # images keep different numbers
    with features(vit) as merged:
        whole = vit.forward_features(IMAGES[0])
    assert all(x.shape == (2, 64, 32) for x in merged.values())
    torch.testing.assert_close(merged[1], plain[1])
    torch.testing.assert_close(vit.norm(merged[4]), whole[:, 1:], atol=1e-5, rtol=1e-5)
    found = patch.reduction(vit)
    for layer in (2, 3, 4):  # patches of one token have its features
        torch.testing.assert_close(merged[layer], found.unmerge(found.merge(merged[layer])), atol=1e-5, rtol=1e-5)


def test_a_segmenter_has_labels_per_pixel_and_all_methods_are_tried(small_net):
    model = create_segmenter(small_net).eval()
    images = torch.randn(1, 3, 30, 30)  # no whole patches
    rows = {row["name"]: row for row in patch.benchmark(model, images, repeats=1)}
    assert rows.keys() <= {"pure", *untrained_methods()} and len(rows) > 8
    assert not {"dtem", "clustvit"} & rows.keys()  # are trained first
    assert all(row["n_patches"] == 16 and len(row["cosine"]) == 3 for row in rows.values())
    assert all(0 <= row["agreement"] <= 1 and 0 < row["tokens"] <= 16 for row in rows.values())


def test_without_a_head_there_are_no_labels(vit):
    vit.reset_classifier(0)
    assert [row["agreement"] for row in patch.benchmark(vit, IMAGES[0], ["tome"], repeats=1)] == [None, None]


def test_what_cannot_be_measured_is_refused(vit):
    for images, given, allowed in (
        (IMAGES, {"methods": ["nosuch"]}, "nosuch: unknown method"),
        (IMAGES, {"methods": {"a": ("tome", {"threshold": 1})}}, "a: tome takes no threshold"),
        (IMAGES, {"tokens": 65}, "64 patches"),
        (IMAGES, {"tokens": 0}, "64 patches"),
        ([], {}, "at least one image"),
    ):
        with pytest.raises(ValueError, match=allowed):
            patch.benchmark(vit, images, **given)
    with pytest.raises(ValueError, match="evaluation mode"):
        patch.benchmark(vit.train(), IMAGES)
    with pytest.raises(ValueError, match="unpatched"):
        patch.benchmark(patch.apply(vit.eval(), "tome"), IMAGES)
