"""Checkpoints of mmsegmentation's Segmenter and ours: the same logits on both sides."""

import importlib
import sys
import warnings
from pathlib import Path

import pytest
import torch

from segm.checkpoint import load_checkpoint
from segm.run import Run

SCRIPTS = Path(__file__).parents[2] / "scripts"
SIDE = 32


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("convert_checkpoint")
    sys.modules.pop("convert_checkpoint")


@pytest.fixture
def segmentor():
    """mmsegmentation's Segmenter with random weights."""
    from segm.data import openmmlab  # noqa: F401 -- registers, and keeps the import quiet

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmseg.models import build_segmentor
    backbone = {"type": "VisionTransformer", "img_size": (SIDE, SIDE), "patch_size": 8, "embed_dims": 128}
    backbone |= {"num_layers": 3, "num_heads": 2, "final_norm": True, "patch_bias": True}
    backbone |= {"norm_cfg": {"type": "LN", "eps": 1e-6}}
    head = {"type": "SegmenterMaskTransformerHead", "in_channels": 128, "channels": 128, "num_classes": 11}
    head |= {"num_layers": 2, "num_heads": 2, "embed_dims": 128, "dropout_ratio": 0.0}
    model = build_segmentor({"type": "EncoderDecoder", "backbone": backbone, "decode_head": head, "test_cfg": {}})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2)
    model.eval()
    return model


@torch.inference_mode()
def test_there_and_back_with_the_same_logits(script, segmentor, tmp_path, call):
    images = torch.randn(2, 3, SIDE, SIDE)
    expected = segmentor.decode_head(segmentor.backbone(images))
    torch.save({"state_dict": segmentor.state_dict(), "meta": {}}, tmp_path / "theirs.pth")
    call(script, tmp_path / "theirs.pth", tmp_path / "run", "--dataset", "shapes")
    run = Run.load(tmp_path / "run", device="cpu")
    torch.testing.assert_close(run.model.grid_logits(images), expected, atol=1e-5, rtol=1e-5)
    assert run.classes == tuple(class_names()) and run.crop_size == (SIDE, SIDE)
    merged = Run.load(tmp_path / "run", device="cpu", patch_type="graph", layers=[1], threshold=0.5)
    assert merged.model.grid_logits(images).shape == expected.shape

    call(script, tmp_path / "run", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)
    assert back["meta"]["dataset_meta"]["classes"] == list(run.classes)
    result = segmentor.load_state_dict(back["state_dict"], strict=False)
    assert not result.unexpected_keys and not result.missing_keys
    for name, values in segmentor.state_dict().items():
        assert torch.equal(values, back["state_dict"][name])


def class_names():
    from segm.data import class_info

    return class_info("shapes")[0]


def test_what_cannot_be_converted_is_refused(script, segmentor, shapes_run, tmp_path, refused, call):
    weights = segmentor.state_dict()
    torch.save(weights, tmp_path / "theirs.pth")
    assert "--dataset" in refused(script, tmp_path / "theirs.pth", tmp_path / "new")
    assert "is there already" in refused(script, shapes_run, tmp_path)
    for name in ("decode_head.cls_emb", "backbone.layers.1.attn.attn.in_proj_weight"):
        torch.save({key: values for key, values in weights.items() if key != name}, tmp_path / "less.pth")
        assert name in refused(script, tmp_path / "less.pth", tmp_path / "new", "--dataset", "shapes")
    assert not (tmp_path / "new").exists()
    torch.save({"state_dict": weights, "history": class_names}, tmp_path / "more.pth")
    assert "save its state_dict" in refused(script, tmp_path / "more.pth", tmp_path / "new", "--dataset", "shapes")
    call(script, shapes_run, tmp_path / "ours.pth")
    saved = torch.load(tmp_path / "ours.pth", weights_only=True)["state_dict"]
    own = load_checkpoint(shapes_run)["model"]
    assert len(saved) == len([name for name in own if not name.startswith("encoder.head")])


@torch.inference_mode()
def test_a_clustvit_keeps_its_modules(script, segmentor, tmp_path, call):
    weights = dict(segmentor.state_dict())
    del weights["backbone.patch_embed.projection.bias"]
    shapes = {
        "clusterer.net.0": (40, 128),
        "clusterer.net.2": (3, 40),
        "expand_mlp.0": (128, 256),
        "expand_mlp.2": (128, 128),
    }
    for name, shape in shapes.items():
        weights[f"backbone.{name}.weight"] = torch.randn(shape)
        weights[f"backbone.{name}.bias"] = torch.randn(shape[0])
    torch.save({"state_dict": weights}, tmp_path / "clustvit.pth")
    call(script, tmp_path / "clustvit.pth", tmp_path / "run", "--dataset", "shapes", "--injection-point", 1)
    run = Run.load(tmp_path / "run", device="cpu")
    assert run.method == "clustvit" and run.options["layers"] == (1,) and run.options["clusters"] == 2
    for name in shapes:
        assert torch.equal(run.model.encoder.get_parameter(f"{name}.weight"), weights[f"backbone.{name}.weight"])
    assert not run.model.encoder.patch_embed.proj.bias.any()
    assert run.model(torch.randn(2, 3, SIDE, SIDE)).isfinite().all()
    call(script, tmp_path / "run", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert all(torch.equal(values, back[name]) for name, values in weights.items())
