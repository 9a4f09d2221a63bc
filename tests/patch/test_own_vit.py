"""Modules of one's own made of timm's blocks: taken where their parts are found, else refused with what is missing."""

import copy

import pytest
import timm
import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import nn

import patch
from tests.helpers import METHOD_OPTIONS, different_images, few_and_all


class Own(nn.Module):
    """Blocks, an embedding and a CLS token, run as its author likes."""

    def __init__(self):
        super().__init__()
        self.patch_embed = PatchEmbed(32, 8, 3, 32)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 32))
        self.position = nn.Parameter(torch.randn(1, 17, 32))
        self.blocks = nn.ModuleList(Block(32, 2) for _ in range(3))
        self.norm = nn.LayerNorm(32)

    def forward(self, images):
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


@torch.inference_mode()
@pytest.mark.parametrize("methods", few_and_all([name for name in METHOD_OPTIONS if name not in ("dtem", "clustvit")]))
def test_it_merges_as_a_vit_of_timm(methods):
    model, images = Own().eval(), different_images()
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 0}
    twin = timm.create_model("vit_tiny_patch16_224", qkv_bias=False, **size).eval()
    weights = {("pos_embed" if name == "position" else name): value for name, value in model.state_dict().items()}
    twin.load_state_dict(weights)
    for one in (*model.blocks, model.norm, *twin.blocks, twin.norm):
        for part in one.modules():
            if isinstance(part, nn.LayerNorm):
                part.eps = 1e-6
    plain = model(images)
    torch.testing.assert_close(plain, twin.forward_features(images))
    for method in methods:
        for one in (model, twin):
            patch.apply(one, method, **METHOD_OPTIONS[method])
        found = model(images)
        torch.testing.assert_close(found, twin.forward_features(images), atol=1e-5, rtol=1e-5, msg=method)
        assert patch.reduction(model).lengths == patch.reduction(twin).lengths
        torch.testing.assert_close(copy.deepcopy(model)(images), found)
        for one in (model, twin):
            patch.remove(one)
        assert model(images).equal(plain) and type(model) is Own


def test_what_is_missing_is_said():
    without = nn.Module()
    without.blocks = Own().blocks
    with pytest.raises(ValueError, match="its blocks are timm's, but it lacks a patch_embed"):
        patch.apply(without, "tome")
    another = Own()
    another.num_prefix_tokens = 2  # it has one
    patch.apply(another, "tome")
    with pytest.raises(ValueError, match="17 tokens where 18 are left"):
        another(torch.randn(1, 3, 32, 32))
