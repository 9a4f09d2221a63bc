"""Encoder weights of other projects: names, prefixes, wrappers, what is left out, what is refused."""

import hashlib
import logging
import random

import pytest
import timm
import torch
from safetensors.torch import save_file

from segm.model.encoder import create_encoder, resize_position_embedding
from segm.model.pretrained import load_pretrained, read_weights

NET = {"backbone": "vit_small_patch14_dinov2", "n_layers": 2, "d_model": 48, "n_heads": 6, "image_size": (28, 42)}
NET |= {"dropout": 0.0}


def load(tensors, file, **net):
    """An encoder with the weights that a file holds."""
    (save_file if file.suffix == ".safetensors" else torch.save)(tensors, file)
    encoder = create_encoder(NET | net)
    load_pretrained(encoder, NET["backbone"], str(file))
    return encoder.eval()


@pytest.fixture(scope="module")
def donor():
    """timm's DINOv2, made smaller, on a grid of its own."""
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch14_dinov2", depth=2, embed_dim=48, num_heads=6, img_size=56).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def same(encoder, donor):
    """Whether an encoder is that of the donor, on the donor's grid."""
    images = torch.randn(1, 3, 56, 56)
    return torch.allclose(encoder.forward_features(images), donor.forward_features(images), atol=1e-4)


def test_prefixes_and_wrappers(donor, tmp_path, caplog):
    weights = donor.state_dict()
    square = {"image_size": 56}

    def named(prefix):
        return {prefix + name: value for name, value in weights.items()}

    other = {f"teacher.{name}": torch.randn_like(value) for name, value in weights.items()}
    for tensors in (
        weights,
        {"model": weights, "optimizer": {"state": {0: {"step": torch.tensor(1.0)}}}, "epoch": 3},
        {"state_dict": named("module.")},
        {"state_dict": named("module.backbone.")},
        {"teacher": named("backbone."), "student": {k: torch.zeros_like(v) for k, v in named("module.").items()}},
        {"student": {k: torch.zeros_like(v) for k, v in weights.items()}, "teacher": named("module.backbone.")},
        {"model_ema": weights, "model": {k: torch.zeros_like(v) for k, v in weights.items()}},
        {"model": named("encoder.") | {"decoder.cls_emb": torch.randn(1, 3, 48)}},
        named("visual.trunk."),
    ):
        assert same(load(tensors, tmp_path / "file.pth", **square), donor)
    assert same(load(named("backbone."), tmp_path / "file.safetensors", **square), donor)
    assert not same(load(other | named("student."), tmp_path / "file.pth", **square), donor)
    assert all("\n" not in record.message for record in caplog.records)


def test_what_the_encoder_has_no_use_for_is_named_once(donor, tmp_path, caplog):
    mae = donor.state_dict() | {f"decoder_blocks.{i}.mlp.fc1.weight": torch.zeros(3) for i in range(50)}
    mae |= {"mask_token": torch.zeros(1, 1, 48), "head.weight": torch.zeros(7, 48), "head.bias": torch.zeros(7)}
    with caplog.at_level(logging.WARNING):
        net = {"backbone": "vit_small_patch16_224", "patch_size": 14}
        weights = {k: v for k, v in mae.items() if not k.endswith("gamma")}
        encoder = load(weights, tmp_path / "mae.pth", **net)
    (record,) = caplog.records
    assert "mask_token" in record.message and "decoder_blocks" in record.message and "head.weight" in record.message
    assert encoder.head.weight.shape == (1000, 48)
    assert torch.equal(encoder.blocks[1].mlp.fc1.weight, mae["blocks.1.mlp.fc1.weight"])


def test_chunked_names_of_dinov2(donor, tmp_path):
    weights = {name.replace("blocks.1.", "blocks.1.1."): value for name, value in donor.state_dict().items()}
    weights = {name.replace("blocks.0.", "blocks.0.0."): value for name, value in weights.items()}
    assert same(load(weights, tmp_path / "chunks.pth", image_size=56), donor)


def test_the_names_of_transformers(donor, tmp_path):
    """As DINOv2 is saved there; queries, keys and values apart."""
    theirs = {}
    for name, value in donor.state_dict().items():
        name = name.replace("blocks.", "encoder.layer.").replace("gamma", "lambda1").replace(".ls", ".layer_scale")
        name = name.replace("attn.proj", "attention.output.dense").replace(
            "patch_embed.proj", "patch_embeddings.projection"
        )
        name = name.replace("pos_embed", "position_embeddings")
        if name.split(".")[0] in ("cls_token", "position_embeddings", "patch_embeddings"):
            name = f"embeddings.{name}"
        if name.startswith("norm."):
            name = f"layer{name}"
        if "attn.qkv" in name:
            for part, rows in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs[name.replace("attn.qkv", f"attention.attention.{part}")] = rows
        else:
            theirs[name] = value
    theirs["embeddings.mask_token"] = torch.zeros(1, 48)
    assert not set(donor.state_dict()) & set(theirs)
    for prefix in ("", "dinov2."):
        named = {prefix + name: value.contiguous() for name, value in theirs.items()}
        assert same(load(named, tmp_path / "hf.safetensors", image_size=56), donor)


def test_registers_take_over_the_position_of_cls(donor, tmp_path):
    """timm's DINOv2 with registers has none for CLS; the published file has."""
    net = {"backbone": "vit_small_patch14_reg4_dinov2", "image_size": 56}
    published = donor.state_dict() | {"register_tokens": torch.randn(1, 4, 48)}
    encoder = load(published, tmp_path / "reg.pth", **net)
    expected = published["cls_token"] + published["pos_embed"][:, :1]
    assert torch.equal(encoder.cls_token, expected)
    assert torch.equal(encoder.pos_embed, published["pos_embed"][:, 1:])
    assert torch.equal(encoder.reg_token, published["register_tokens"])


def test_rotary_models(tmp_path):
    """As timm names them and as transformers does."""
    torch.manual_seed(0)
    shape = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}
    donor = timm.create_model("vit_small_patch16_dinov3", **shape).eval()
    for parameter in donor.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    net = {"backbone": "vit_small_patch16_dinov3", "n_heads": 3, "image_size": 32}
    net["n_heads"] = 6
    own = donor.state_dict()
    theirs = {}
    for name, value in own.items():
        name = name.replace("blocks.", "layer.").replace("attn.proj", "attention.o_proj")
        name = name.replace("gamma_1", "layer_scale1.lambda1").replace("gamma_2", "layer_scale2.lambda1")
        name = (
            name.replace("fc1", "up_proj").replace("fc2", "down_proj").replace("patch_embed.proj", "patch_embeddings")
        )
        name = name.replace("reg_token", "register_tokens")
        if name.split(".")[0] in ("cls_token", "register_tokens", "patch_embeddings"):
            name = f"embeddings.{name}"
        if "attn.qkv" in name:
            for part, rows in zip("qkv", value.chunk(3), strict=True):
                theirs[name.replace("attn.qkv", f"attention.{part}_proj")] = rows
        else:
            theirs[name] = value
    for tensors in (own, theirs, theirs | {"layer.0.attention.q_proj.bias": torch.zeros(48)}):
        encoder = load({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "rotary.safetensors", **net)
        assert all(torch.equal(encoder.state_dict()[name], value) for name, value in own.items())
    with pytest.raises(ValueError, match="no place"):
        load(theirs | {"layer.0.attention.q_proj.bias": torch.ones(48)}, tmp_path / "biased.pth", **net)


def test_what_does_not_fit_is_named(donor, tmp_path):
    weights = donor.state_dict()
    for tensors, net, hint in (
        ({"fc.weight": torch.zeros(2, 2)}, {}, "no plain ViT"),
        ({}, {}, "no tensors"),
        ({k: v for k, v in weights.items() if "blocks.1" not in k}, {}, "lacks blocks"),
        (weights, {"n_layers": 1}, "2 blocks"),
        (weights, {"d_model": 96}, "--no-pretrained"),
        (weights | {"pos_embed": torch.zeros(1, 12, 48)}, {}, "square"),
        (weights | {"norm.bias": torch.full((48,), torch.nan)}, {}, "not finite"),
    ):
        with pytest.raises(ValueError, match=hint) as error:
            load(tensors, tmp_path / "wrong.pth", **net)
        assert "\n" not in str(error.value) and "wrong.pth" in str(error.value)


def test_objects_that_are_not_loaded_are_named(tmp_path):
    import argparse

    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "args.pth")
    with pytest.raises(ValueError, match=r"safety \(argparse\.Namespace"):
        read_weights(tmp_path / "args.pth")


def test_a_checksum_beside_a_file_is_verified(donor, tmp_path):
    file = tmp_path / "weights.safetensors"
    save_file(donor.state_dict(), file)
    content = file.read_bytes()
    (tmp_path / "weights.safetensors.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  {file.name}\n")
    read_weights(file)
    chance = random.Random(0)
    for _ in range(20):
        damaged = bytearray(content)
        damaged[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights\.safetensors"):
            read_weights(file)


def test_a_run_says_the_grid_of_its_position_embedding(tmp_path):
    for size, grid in (([28, 42], (2, 3)), ([28, 112], (2, 8)), ([112, 28], (8, 2))):  # 16 patches may also be 4 × 4
        run = create_encoder(NET | {"image_size": size})
        torch.nn.init.normal_(run.pos_embed)
        (tmp_path / "variant.yml").write_text(f"net_kwargs: {{image_size: {size}, patch_size: 14}}")
        for file in ("checkpoint.pth", "model.safetensors"):
            found = load(run.state_dict(), tmp_path / file, image_size=(56, 56)).pos_embed
            assert torch.equal(found, resize_position_embedding(run.pos_embed, grid, (4, 4), 1))
