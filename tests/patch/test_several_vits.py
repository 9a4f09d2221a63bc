"""A model with several ViTs, or with a tower that only looks like one, is refused by name and left as it is."""

import pytest
import torch
from torch import nn

import patch
from tests.families import FAMILIES, HF, TIMM, hugging, vit
from tests.helpers import different_images, right_or_refused

TEXT = {"vocab_size": 100, "max_position_embeddings": 16, "projection_size": 32, "bos_token_id": 1, "eos_token_id": 2}
DINO = {name: HF[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads")}


class Two(nn.Module):
    """Two backbones side by side, as in OpenVLA."""

    def __init__(self, first, second):
        super().__init__()
        self.featurizer, self.fused_featurizer = first, second


class Holder(nn.Module):
    """A model that keeps ViTs deeper inside."""

    def __init__(self, **parts):
        super().__init__()
        self.towers = nn.ModuleDict(parts)


def classes(model):
    return [type(m) for m in model.modules()]


@pytest.mark.parametrize("second", ["vit", "eva", "Dinov2", "SiglipVision", "mmseg", "segmenter"])
def test_two_vits_are_refused_with_their_names(second):
    for first in ("vit", "Dinov2", "segmenter"):
        model = Two(FAMILIES[first].build(), FAMILIES[second].build())
        before = classes(model)
        with pytest.raises(ValueError, match=r"featurizer\b.*fused_featurizer\b") as caught:
            patch.apply(model, "tome")
        assert "\n" not in str(caught.value)
        assert classes(model) == before and not patch.is_patched(model)


def test_deeper_ones_are_named_by_their_path():
    model = Holder(student=vit(), teacher=vit(), other=nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"towers\.student.*towers\.teacher"):
        patch.apply(model, "graph")
    patch.apply(model.towers["student"], "graph")  # that one alone can be patched
    assert patch.is_patched(model.towers["student"]) and not patch.is_patched(model.towers["teacher"])


@torch.inference_mode()
def test_one_vit_with_two_names_is_one():
    one, images = vit(), different_images(2)
    model = Two(one, one)
    patch.apply(model, "tome", r=2)
    expected = patch.apply(vit(), "tome", r=2)(images)
    torch.testing.assert_close(model.fused_featurizer(images), expected)
    assert not patch.is_patched(patch.remove(model)) and not patch.is_patched(one)


def test_depth_pro_is_refused_with_the_names_of_its_vits():
    transformers = pytest.importorskip("transformers")
    own = DINO | {"image_size": 64, "patch_size": 16, "model_type": "dinov2"}
    config = transformers.DepthProConfig(
        fusion_hidden_size=16, patch_size=64, intermediate_hook_ids=[2, 1], intermediate_feature_dims=[16, 16],
        scaled_images_ratios=[0.25, 0.5, 1], scaled_images_overlap_ratios=[0.0, 0.5, 0.25],
        scaled_images_feature_dims=[16, 16, 16],
        image_model_config=own, patch_model_config=own, fov_model_config=own, use_fov_model=True,
    )  # fmt: skip
    model = transformers.DepthProForDepthEstimation(config)
    vits = [name for name, m in model.named_modules() if type(m).__name__ == "Dinov2Model"]
    assert len(vits) == 3
    with pytest.raises(ValueError) as caught:
        patch.apply(model, "tome")
    assert all(name in str(caught.value) for name in vits) and "\n" not in str(caught.value)


def two_towers(kind):
    transformers = pytest.importorskip("transformers")
    text = {name: value for name, value in HF.items() if name not in ("image_size", "patch_size")} | TEXT
    if kind == "CLIP":
        text["projection_dim"] = 32
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=dict(HF))
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}Model")(config).eval()


@torch.inference_mode()
def test_of_a_model_with_a_tower_of_text_the_other_one_is_patched_or_it_is_refused():
    words, images = torch.randint(0, 100, (2, 16)), different_images(2)
    model, alone = two_towers("Siglip"), two_towers("Siglip")
    before = classes(model)
    text = model.text_model(input_ids=words).last_hidden_state
    patch.apply(alone.vision_model, "tome", r=2)
    expected = alone.vision_model(pixel_values=images).last_hidden_state

    def patched():
        patch.apply(model, "tome", r=2)
        return model.vision_model(pixel_values=images).last_hidden_state

    if right_or_refused(patched, expected, match="vision_model"):
        assert classes(model) == before
    torch.testing.assert_close(model.text_model(input_ids=words).last_hidden_state, text)


def test_the_tower_of_text_itself_is_refused():
    model = two_towers("Siglip")
    with pytest.raises(ValueError, match="cannot patch a Siglip"):
        patch.apply(model.text_model, "tome")


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["CLIPVision", "Siglip2Vision", "EomtDinov3", "ViTMAE", "Beit", "Data2VecVision"])
def test_other_models_of_transformers_are_right_or_refused(kind):
    """Where nothing merges, a patched one is the unpatched one."""
    cls = "ForUniversalSegmentation" if kind == "EomtDinov3" else "Model"
    more = {"num_blocks": 1, "num_queries": 4, "num_labels": 3} if kind == "EomtDinov3" else {}
    if kind == "Siglip2Vision":
        transformers = pytest.importorskip("transformers")
        sizes = {name: value for name, value in HF.items() if name != "image_size"}
        model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**sizes, num_patches=16)).eval()
        images = {"pixel_values": torch.randn(2, 16, 3 * 64), "pixel_attention_mask": torch.ones(2, 16).long()}
        images["spatial_shapes"] = torch.tensor([[4, 4], [4, 4]])
    else:
        model, images = hugging(kind, cls=cls, **more), {"pixel_values": different_images(2)}
    if kind == "ViTMAE":
        model.config.mask_ratio = 0.0
        images["noise"] = torch.rand(2, 16)
    expected = model(**images)[0]

    def patched():
        patch.apply(model, "graph", threshold=1.0)
        return model(**images)[0]

    called = {"EomtDinov3": "EoMT masks its attention", "ViTMAE": "MAE keeps its patches in their order"}
    right_or_refused(patched, expected, match=called.get(kind, kind.removesuffix("Vision")), atol=1e-4)


def test_own_subclasses_are_what_they_derive_from():
    transformers, images = pytest.importorskip("transformers"), different_images(2)
    from timm.models.vision_transformer import VisionTransformer

    class MyDino(transformers.Dinov2Model):
        pass

    class MyViT(VisionTransformer):
        pass

    base = hugging("Dinov2")
    own = MyDino(base.config).eval()
    own.load_state_dict(base.state_dict())
    expected = patch.apply(base, "tome", r=2)(images).last_hidden_state
    torch.testing.assert_close(patch.apply(own, "tome", r=2)(images).last_hidden_state, expected)
    assert isinstance(own, MyDino) and type(patch.remove(own)) is MyDino
    base, own = vit(), MyViT(**TIMM).eval()
    own.load_state_dict(base.state_dict())
    torch.testing.assert_close(patch.apply(own, "tome", r=2)(images), patch.apply(base, "tome", r=2)(images))
    assert isinstance(own, MyViT) and type(patch.remove(own)) is MyViT
