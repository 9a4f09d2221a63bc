"""The Segmenter: conformance, sizes, backbones, pretrained weights."""

from typing import ClassVar

import pytest
import timm
import torch

from segm.config import load_config
from segm.model.encoder import create_encoder
from segm.model.factory import copy_weights, create_segmenter
from tests.helpers import write_variant


@torch.inference_mode()
def test_any_image_size(small_net):
    for decoder in ("linear", "mask_transformer"):
        model = create_segmenter(small_net | {"decoder": {"name": decoder}}).eval()
        for size in ((32, 32), (8, 8), (47, 70), (1, 1)):
            images = torch.randn(2, 3, *size)
            logits = model(images)
            assert logits.shape == (2, 5, *size)
            assert torch.equal(model.predict(images), logits.argmax(1))


@torch.inference_mode()
def test_predict_in_bands_equals_the_argmax_of_the_logits(golden_model, cases, monkeypatch):
    expected = {name: golden_model(cases[name]).argmax(1) for name in ("x2", "xrect")}
    for limit in (1, 300_000, 10**9):
        monkeypatch.setattr("segm.model.upsample.BAND_BYTES", limit)
        for name, labels in expected.items():
            assert torch.equal(golden_model.predict(cases[name]), labels)


def test_released_backbones_have_their_published_shape():
    for name, published in load_config("backbones").items():
        with torch.device("meta"):
            encoder = create_encoder({"backbone": name})
        assert encoder.embed_dim == published["d_model"] and len(encoder.blocks) == published["n_layers"]
        assert encoder.blocks[0].attn.num_heads == published["n_heads"]
        assert encoder.patch_embed.patch_size == (published["patch_size"],) * 2
        assert encoder.patch_embed.img_size == (published["image_size"],) * 2
        assert encoder.num_prefix_tokens == 1 + published["distilled"]
        assert encoder.norm.eps == encoder.blocks[0].norm1.eps == 1e-5


def test_other_plain_vits_of_timm():
    prefixes = {
        "vit_small_patch14_reg4_dinov2": 5,
        "vit_base_patch16_siglip_224": 0,
        "deit3_small_patch16_224": 1,
        "deit_tiny_distilled_patch16_224": 2,
        "vit_tiny_patch16_224": 1,
    }
    for name, prefix in prefixes.items():
        net = {"backbone": name, "d_model": 32, "n_heads": 2, "n_layers": 2, "image_size": 56, "n_cls": 3}
        model = create_segmenter(net | {"decoder": {"name": "mask_transformer"}})
        assert model.encoder.num_prefix_tokens == prefix
        logits = model(torch.randn(2, 3, 60, 44))
        assert logits.shape == (2, 3, 60, 44)
        logits.mean().backward()
        unreached = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert unreached == []  # DistributedDataParallel would stop


def test_position_embedding_equals_timm_at_its_own_grid():
    net = {"backbone": "vit_tiny_patch16_224", "n_layers": 2, "n_cls": 2, "decoder": {"name": "linear"}}
    encoder = create_encoder(net).eval()  # a Segmenter's linear layers may round in other places
    reference = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
    reference.load_state_dict(encoder.state_dict())
    images = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        assert torch.equal(encoder.forward_features(images), reference.forward_features(images))


def test_unknown_settings_are_named(small_net):
    for change, allowed in [
        ({"backbone": "resnet50"}, "plain ViT|timm cannot build"),
        ({"backbone": "vit_huge_patch1"}, "vit_tiny_patch16_384"),
        ({"backbone": "swin_tiny_patch4_window7_224"}, "plain ViT|timm cannot build"),
        ({"d_model": 30, "n_heads": 4}, "timm cannot build"),
        ({"distilled": True}, "distillation"),
        ({"decoder": {"name": "fpn"}}, "linear, linear_bn"),
        ({"decoder": None}, "no mapping"),
        ({"d_model": 200, "n_heads": 4, "decoder": {"name": "mask_transformer"}}, "multiple of 64"),
    ]:
        with pytest.raises(ValueError, match=allowed) as error:
            create_segmenter(small_net | change)
        assert "\n" not in str(error.value)


def test_settings_that_lack_something_are_named():
    with pytest.raises(ValueError, match="n_cls, decoder"):
        create_segmenter({"backbone": "vit_tiny_patch16_384"})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """timm's weights of the released tiny ViT as a file, and the model they come from."""
    torch.manual_seed(0)
    donor = timm.create_model("vit_tiny_patch16_384")
    file = tmp_path_factory.mktemp("weights") / "vit_tiny.pth"
    torch.save(donor.state_dict(), file)
    return file, donor


class TestPretrained:
    NET: ClassVar = {"backbone": "vit_tiny_patch16_384", "n_cls": 3, "decoder": {"name": "linear"}}

    def test_a_file_is_loaded(self, weights):
        file, donor = weights
        encoder = create_segmenter(self.NET, pretrained=str(file)).encoder
        for name, value in donor.state_dict().items():
            assert torch.equal(encoder.state_dict()[name], value), name

    def test_the_position_embedding_is_resized_bilinearly(self, weights):
        file, donor = weights
        encoder = create_segmenter(self.NET | {"image_size": (512, 256)}, pretrained=str(file)).encoder
        grid = donor.pos_embed[:, 1:].view(1, 24, 24, -1).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(grid, (32, 16), mode="bilinear").flatten(2).transpose(1, 2)
        torch.testing.assert_close(encoder.pos_embed[:, 1:], expected)
        assert torch.equal(encoder.pos_embed[:, :1], donor.pos_embed[:, :1])

    def test_weights_of_another_size_are_not_resampled_on_the_way(self, tmp_path):
        donor = timm.create_model("vit_tiny_patch16_384", img_size=128)
        torch.save({"model": donor.state_dict()}, tmp_path / "small.pth")
        encoder = create_segmenter(self.NET | {"image_size": 128}, pretrained=str(tmp_path / "small.pth")).encoder
        assert torch.equal(encoder.pos_embed, donor.pos_embed)

    def test_weights_that_do_not_fit_are_refused(self, weights):
        for change in ({"n_layers": 6}, {"n_heads": 6}, {"d_model": 96}):
            with pytest.raises(ValueError, match="--no-pretrained"):
                create_segmenter(self.NET | change, pretrained=str(weights[0]))

    def test_missing_and_damaged_files_are_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            create_segmenter(self.NET, pretrained=str(tmp_path / "nowhere.pth"))
        (tmp_path / "bad.pth").write_bytes(b"no weights")
        with pytest.raises(ValueError, match=r"bad\.pth"):
            create_segmenter(self.NET, pretrained=str(tmp_path / "bad.pth"))

    def test_unreachable_weights_say_what_to_do(self, monkeypatch):
        def offline(*args, **kwargs):
            raise OSError("no network\nat all")

        monkeypatch.setattr(timm, "create_model", lambda *a, **k: offline() if k.get("pretrained") else real(*a, **k))
        with pytest.raises(ConnectionError, match="--pretrained FILE"):
            create_segmenter(self.NET, pretrained=True)


real = timm.create_model


def test_a_run_is_fine_tuned_with_coarser_patches(small_net, tmp_path):
    """The patch embedding is resampled: on images of one color, every patch says the same as before."""
    torch.manual_seed(0)
    fine, coarse = create_segmenter(small_net), create_segmenter(small_net | {"patch_size": 16})
    torch.save({"model": fine.state_dict()}, tmp_path / "checkpoint.pth")
    write_variant({"net_kwargs": small_net}, tmp_path)
    copy_weights(coarse, tmp_path)
    images = torch.ones(1, 3, 32, 32) * torch.tensor([0.3, -1.0, 2.0]).view(1, 3, 1, 1)
    expected, found = (model.encoder.patch_embed(images)[0, 0, 0] for model in (fine, coarse))
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    assert coarse.encoder.pos_embed.shape[1] == 1 + 4
    assert torch.equal(coarse.decoder.cls_emb, fine.decoder.cls_emb)
