"""Pictures with several bands, such as a satellite's: those that are named become the channels of the network."""

import cv2
import numpy as np
import pytest
import tifffile
import timm
import torch
from timm.models._manipulate import adapt_input_conv

from segm import inference, show_attn_map, token_stats, train
from segm.data import create_dataset
from segm.data.images import normalize, read_image, resize_keep_ratio
from segm.eval import miou
from segm.model.encoder import create_encoder
from segm.model.factory import copy_weights, create_segmenter
from segm.model.pretrained import load_encoder, load_pretrained
from segm.run import Run

NETWORK = (
    *("--dataset", "folder", "--backbone", "vit_tiny_patch16_384", "--patch-size", 8, "--d-model", 32, "--n-layers", 2),
    *("--im-size", 32, "--crop-size", 32, "--batch-size", 2, "--epochs", 1, "--num-workers", 0, "--no-pretrained"),
)
GRAPH = ("--patch-type", "graph", "--threshold", 0.5, "--selected-layer", 1)
CPU = ("--device", "cpu")
KERNEL = "patch_embed.proj.weight"


@pytest.fixture(scope="module")
def satellite(tmp_path_factory):
    """Pictures of five bands in 16 bits, of which the mask shows in the fourth alone."""
    root, rng = tmp_path_factory.mktemp("satellite"), np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            mask = rng.integers(0, 2, (5, 6), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            values = rng.integers(0, 1000, (40, 48, 5), dtype=np.uint16)
            values[..., 3] = np.uint16(4000) * mask
            contiguous = index % 2 == 0
            how = {"photometric": "minisblack", "planarconfig": "contig" if contiguous else "separate"}
            tifffile.imwrite(
                root / f"images/{split}/{index}.tif", values if contiguous else values.transpose(2, 0, 1), **how
            )
            cv2.imwrite(str(root / f"annotations/{split}/{index}.png"), mask)
    (root / "classes.yml").write_text("[dry, wet]")
    return root


def test_bands_are_read_as_they_are_stored(satellite, tmp_path):
    for file in sorted((satellite / "images/train").iterdir()):
        values = tifffile.imread(file)
        values = values if values.shape[2] == 5 else np.moveaxis(values, 0, 2)
        stored = np.rint(values * (255 / 4095)).astype(np.uint8)
        for bands in ((4, 3, 2), (4,), (1, 2, 3, 4, 5), (2, 2)):
            found = read_image(file, value_range=(0, 4095), bands=bands)
            assert np.array_equal(found, stored[..., [band - 1 for band in bands]])
    with pytest.raises(ValueError, match=r"holds 5 band.* number 6"):
        read_image(file, bands=(1, 6))
    with pytest.raises(ValueError, match="--bands 4 3 2"):
        read_image(file)
    photo = stored[..., :3].copy()
    cv2.imwrite(str(tmp_path / "photo.png"), photo)
    assert np.array_equal(read_image(tmp_path / "photo.png", bands=(3, 2, 1)), photo)
    cv2.imwrite(str(tmp_path / "gray.png"), photo[..., 0])
    assert np.array_equal(read_image(tmp_path / "gray.png", bands=(1,)), photo[..., :1])


@pytest.mark.parametrize("bands", [(4,), (4, 1), (4, 3, 2), (5, 4, 3, 2, 1)])
def test_items_have_these_bands(satellite, bands):
    """Resized, cropped and padded with their labels; numbers of the normalization are taken in turn."""
    settings = {"root": satellite, "image_size": 32, "bands": bands, "normalization": "deit"}
    images = create_dataset("folder", "train", crop_size=64, ratios=(1.0, 1.0), flip=False, **settings)
    item, sample = images[0, 0], images[0]
    assert item["image"].shape == (len(bands), 64, 64) and item["image"].dtype == torch.float32
    resized = resize_keep_ratio(sample.image, 128, 32)
    assert sample.image.shape == (40, 48, len(bands)) and sample.photo.shape == (40, 48, 3)
    padded = item["label"] == 255
    assert padded[32:].all() and (item["image"][:, padded] == 0).all()
    if len(bands) != 3:  # colors are distorted
        torch.testing.assert_close(item["image"][:, :32, : resized.shape[1]], normalize(resized, "deit"))
    numbers = normalize(np.full((1, 1, 4), 255, np.uint8), "deit").flatten()
    assert numbers[3] == numbers[0] != numbers[1]


@pytest.mark.parametrize("bands", [(4,), (5, 4, 3, 2)])
def test_a_run_knows_its_bands(satellite, bands, tmp_path, call, refused, monkeypatch):
    monkeypatch.setenv("DATASET", str(satellite))
    call(train, "--log-dir", tmp_path / "run", *NETWORK, *GRAPH, *CPU, "--bands", *bands)
    run, file = Run.load(tmp_path / "run", device="cpu"), satellite / "images/val/0.tif"
    assert run.bands == bands and run.model.encoder.patch_embed.proj.in_channels == len(bands)
    labels = run.predict(file)
    assert labels.shape == (40, 48) and np.array_equal(labels, run.predict(read_image(file, bands=bands)))
    assert run.preprocess_resized(file).shape == (1, len(bands), 32, 32)
    assert 0 <= run.evaluate()["mean_iou"] <= 100
    with pytest.raises(ValueError, match=rf"\(H, W, {len(bands)}\)"):
        run.predict(np.zeros((8, 8, 3), np.uint8))
    call(inference, tmp_path / "run", "-i", file.parent, "-o", tmp_path / "out", "--num-workers", 0, *CPU)
    assert cv2.imread(str(tmp_path / "out/0_blend.jpg")).shape == (40, 48, 3)
    assert np.array_equal(cv2.imread(str(tmp_path / "out/0.png"), cv2.IMREAD_UNCHANGED), labels)
    call(miou, tmp_path / "run", "folder", "--save-images", "--num-workers", 0, *CPU)
    call(show_attn_map, tmp_path / "run", file, tmp_path / "maps", "--enc", "--cls", "--layer-id", 1, *CPU)
    call(token_stats, tmp_path / "run", file.parent, *CPU)
    other = ("--log-dir", tmp_path / "run", "--resume", *CPU, "--bands", 1)
    assert "--bands" in refused(train, *other)


def test_weights_for_rgb_fit_other_bands(small_net, tmp_path, monkeypatch):
    """A file's, timm's and another run's: channels are repeated and scaled, as timm does it."""
    net = small_net | {"bands": [1, 2, 3, 4]}
    donor, encoder = create_encoder(small_net), create_encoder(net)
    torch.save(donor.state_dict(), tmp_path / "encoder.pth")
    load_encoder(encoder, tmp_path / "encoder.pth", "small")
    assert torch.equal(encoder.state_dict()[KERNEL], adapt_input_conv(4, donor.state_dict()[KERNEL]))
    model, other = create_segmenter(small_net), create_segmenter(net)
    torch.save({"model": model.state_dict()}, tmp_path / "checkpoint.pth")
    copy_weights(other, tmp_path / "checkpoint.pth")
    assert torch.equal(other.encoder.state_dict()[KERNEL], adapt_input_conv(4, model.encoder.state_dict()[KERNEL]))
    known = timm.create_model("vit_tiny_patch16_384")
    monkeypatch.setattr("segm.model.pretrained._fetched", lambda name: known)
    encoder = create_encoder({"backbone": "vit_tiny_patch16_384", "image_size": 32, "bands": [1]})
    load_pretrained(encoder, "vit_tiny_patch16_384", True)
    torch.testing.assert_close(encoder.state_dict()[KERNEL], known.state_dict()[KERNEL].sum(1, keepdim=True))
