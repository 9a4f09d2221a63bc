"""Methods on one model and photographs without labels: what the command prints, writes and refuses."""

import json

import cv2
import numpy as np
import pytest
import timm
import torch
import transformers

from segm import compare
from segm.run import Run

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 6}
METHODS = ["--methods", "graph --threshold 0.9", "tome --r 2", "random"]


@pytest.fixture
def photographs(tmp_path):
    """Two photographs, one of CMYK and one of 16 bits."""
    from PIL import Image

    folder = tmp_path / "photos"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    Image.fromarray(pixels).convert("CMYK").save(folder / "print.jpg")
    cv2.imwrite(str(folder / "deep.png"), pixels.astype(np.uint16) * 257)
    return folder


@pytest.fixture
def tiny(monkeypatch):
    """Every name of timm is a tiny ViT of six classes."""
    real = timm.create_model
    overlay = {"input_size": (3, 32, 32)}

    def create(name, pretrained=False, **more):
        if pretrained:
            raise OSError("no network")
        return real(name, pretrained_cfg_overlay=overlay, **TINY | more)

    monkeypatch.setattr(timm, "create_model", create)


def compared(call, tmp_path, *words):
    """What the command prints, and its rows by name."""
    common = ["--device", "cpu", "--repeats", "1", "--out", tmp_path / "found.html"]
    printed = call(compare, *words, *common)
    found = json.loads((tmp_path / "found.json").read_text())
    return printed, {row["name"]: row for row in found["rows"]}


def test_methods_of_a_name_of_timm(tiny, photographs, tmp_path, call):
    printed, rows = compared(
        call, tmp_path, "vit_tiny_patch16_224", photographs, "--no-pretrained", *METHODS, "--tokens", "0.25"
    )
    assert [*rows] == ["pure", "graph --threshold 0.9", "tome --r 2", "random"]
    assert rows["random"]["tokens"] == 4 and rows["tome --r 2"]["tokens"] == 8  # of 16
    assert "| random |" in printed and "layers 1, 2, 3, 4 |" in printed
    page = (tmp_path / "found.html").read_text()
    assert page.count("data:image/jpeg") == 2 * 4 and "random: 4 of 16 tokens" in page
    assert (
        "tome, layers 1 2 3 4" in page
        and "r 2" in page
        and "http" not in page.replace("http-equiv", "").replace("http://www.w3", "")
    )


def test_methods_of_a_run(shapes_run, photographs, tmp_path, call):
    _, rows = compared(call, tmp_path, shapes_run, photographs, "--methods", "keymatch --selected-layers 2 3")
    assert rows["keymatch --selected-layers 2 3"]["tokens"] == 8 and 0 <= rows["pure"]["agreement"] <= 1
    loaded = compare.load(str(shapes_run / "checkpoint.pth"), None, False, torch.device("cpu"))
    assert loaded.size == Run.load(shapes_run).crop_size


def test_methods_of_a_model_of_transformers(photographs, tmp_path, call):
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64, image_size=32, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    _, rows = compared(call, tmp_path, tmp_path / "vit", photographs, "--methods", "random", "--pictures", "0")
    assert (
        rows["random"]["tokens"] == 8 and rows["random"]["agreement"] is not None and len(rows["pure"]["cosine"]) == 3
    )


def test_what_cannot_be_compared_is_refused(tiny, photographs, shapes_run, tmp_path, refused, monkeypatch):
    (tmp_path / "empty").mkdir()

    def no_network(name, **more):
        raise OSError(f"no way to {name}")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", no_network)
    name = "vit_tiny_patch16_224"
    for words, allowed in (
        ([name, photographs], "cannot fetch the weights of vit_tiny_patch16_224: give --checkpoint or --no-pretrained"),
        (["nosuch", photographs], "timm knows no such model"),
        (["someone/model", photographs], "cannot fetch someone/model"),
        ([shapes_run, photographs, "--no-pretrained"], "has weights of its own"),
        ([name, tmp_path / "empty", "--no-pretrained"], "no photograph"),
        ([name, photographs, "--no-pretrained", "--methods", "tome --threshold 1"], "tome takes"),
        ([name, photographs, "--no-pretrained", "--methods", "tome", "tome"], "listed twice"),
        ([name, photographs, "--no-pretrained", "--tokens", "17"], "16 patches"),
        ([name, photographs, "--no-pretrained", "--out", "page.txt"], "ends in .html"),
    ):
        assert allowed in refused(compare, *words), words
