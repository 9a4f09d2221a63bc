"""EoMT: queries among the tokens, masked attention in training, merging, and every command."""

import copy

import cv2
import pytest
import torch

import patch
from segm import flops, report, show_attn_map, speedtest, test, train
from segm.data import create_dataset
from segm.losses import eomt_loss
from segm.merging import count_tokens
from segm.model.factory import create_segmenter
from segm.model.masks import Prediction
from segm.run import Run
from tests.helpers import METHOD_OPTIONS, different_images, with_parts

CPU, DEVICE = torch.device("cpu"), ("--device", "cpu")
EOMT = {"name": "eomt", "n_queries": 7, "n_blocks": 2}


@pytest.fixture
def model(small_net):
    net = create_segmenter(small_net | {"decoder": EOMT}).eval()
    torch.nn.init.normal_(net.decoder.head.weight)
    return net


def by_hand(model, images, masked=None):
    """Predictions of (B, 3, 32, 32), each query on its own in the last two of three blocks; masked: per block, whether
    queries see but the patches of their mask."""
    encoder, decoder, found = model.encoder, model.decoder, []
    x = encoder._pos_embed(encoder.patch_embed(images))
    for index, block in enumerate(encoder.blocks):
        if index == 1:
            x = torch.cat([encoder.queries.expand(len(x), -1, -1), x], 1)
        bias = None
        if index >= 1:
            found.append(predict(decoder, encoder.norm(x)))
            bias = torch.zeros(len(x), 1, x.shape[1], x.shape[1])
            if masked is not None and masked[index - 1]:
                small = torch.nn.functional.interpolate(found[-1].masks, size=(4, 4), mode="bilinear")
                for image, query, place in (small <= 0).flatten(2).nonzero():
                    bias[image, 0, query, 7 + 1 + place] = float("-inf")
        x = block(x, attn_mask=bias)
    return [*found, predict(decoder, encoder.norm(x))]


def predict(decoder, x):
    grid = x[:, 8:].mT.unflatten(2, (4, 4))
    features = decoder.upscale(grid).permute(0, 2, 3, 1)
    return Prediction(decoder.head(x[:, :7]), (features @ decoder.mask_head(x[:, :7]).mT[:, None]).permute(0, 3, 1, 2))


@torch.inference_mode()
def test_queries_join_the_last_blocks(model):
    images = torch.randn(2, 3, 32, 32)
    last = by_hand(model, images)[-1]
    masks = torch.nn.functional.interpolate(last.masks, size=(32, 32), mode="bilinear").sigmoid()
    expected = torch.einsum("bqc,bqhw->bchw", last.classes.softmax(-1)[..., :5], masks)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert (model.predict(images) == expected.argmax(1)).float().mean() > 0.999
    assert count_tokens(model, images).tolist() == [16, 16]
    for size in ((33, 45), (24, 40)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 5, *size)


@torch.inference_mode()
def test_attention_is_masked_in_training_and_set_free_block_by_block(model):
    images = torch.randn(2, 3, 32, 32)
    for masked in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0)):
        model.decoder.mask_probs.copy_(torch.tensor(masked))
        ((*found,),) = model.training_outputs(images)
        for one, other in zip(found, by_hand(model, images, masked), strict=True):
            torch.testing.assert_close(one.masks, other.masks, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(one.classes, other.classes, atol=1e-4, rtol=1e-4)
    found = []
    model.decoder.mask_probs.fill_(1)
    for progress in (0, 0.25, 0.375, 0.5, 0.75, 1):
        model.decoder.anneal(progress)
        found.append(model.decoder.mask_probs.tolist())
    half = pytest.approx(0.5**0.9)
    assert found == [[1, 1], [1, 1], [half, 1], [0, 1], [0, 0], [0, 0]]
    model.decoder.anneal(0)
    assert model.decoder.mask_probs.tolist() == [0, 0]


def test_older_checkpoints_name_the_mask_probabilities_otherwise(model):
    weights = model.state_dict()
    del weights["decoder.mask_probs"]
    model.load_state_dict(weights | {"decoder.masked": torch.tensor([0.0, 0.5])})
    assert model.decoder.mask_probs.tolist() == [0, 0.5]


def test_every_class_of_an_image_is_a_mask():
    torch.manual_seed(1)
    labels = torch.full((2, 8, 8), 255)
    labels[0, :4], labels[0, 4:, :4] = 2, 0
    masks, classes = torch.full((2, 3, 8, 8), -9.0), torch.full((2, 3, 4), -9.0)
    masks[0, 0, :4], masks[0, 2, 4:, :4] = 9, 9
    for image, query, label in ((0, 0, 2), (0, 1, 3), (0, 2, 0), (1, 0, 3), (1, 1, 3), (1, 2, 3)):
        classes[image, query, label] = 9
    right = Prediction(classes.requires_grad_(), masks.requires_grad_())
    loss = eomt_loss([right], labels)
    torch.testing.assert_close(eomt_loss([right, right], labels), 2 * loss, atol=1, rtol=0.2)  # points are drawn
    for wrong in (Prediction(classes.roll(1, 2), masks), Prediction(classes, masks.roll(1, 1))):
        assert eomt_loss([wrong], labels) > 2 * loss
    nothing = eomt_loss([right], torch.full_like(labels, 255))
    (loss + nothing).backward()
    assert nothing == 0 and classes.grad.isfinite().all() and masks.grad.isfinite().all()


@pytest.mark.slow
def test_it_learns(small_net):
    model = create_segmenter(small_net | {"decoder": EOMT, "drop_path_rate": 0.0})
    images, labels = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    images[:, :, :, 16:] += 3
    labels[:, :, 16:] = 3
    optimizer = torch.optim.AdamW(model.parameters(), 0.003)
    for step in range(80):
        model.decoder.anneal(step / 80)
        optimizer.zero_grad()
        eomt_loss(*model.training_outputs(images), labels).backward()
        optimizer.step()
    assert (model.eval().predict(images) == labels).float().mean() > 0.95
    unused = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not unused


@torch.inference_mode()
def test_every_method_merges_around_the_queries(model):
    images = different_images()
    plain = model(images)
    for method in ("graph", "tome"):
        patch.apply(model, method, **({"threshold": 1.0} if method == "graph" else {"r": 0}))
        torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=1e-5)
        patch.remove(model)
    for method, options in METHOD_OPTIONS.items():
        if method == "diffrate":
            with pytest.raises(ValueError, match="attention of the CLS token"):
                patch.apply(model, method, **options)
            continue
        one = copy.deepcopy(model)
        with_parts(one.encoder, method)
        patch.apply(one, method, **options)
        together = one(images)
        alone = torch.cat([one(image[None]) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4, msg=lambda text, m=method: f"{m}: {text}")
        assert patch.reduction(one).counts.max() < 16, method
        ((found,),) = one.training_outputs(images)
        assert found.masks.shape[:2] == (len(images), 7)
    patch.apply(model, "graph", threshold=0.2)
    with pytest.raises(ValueError, match="joins blocks of the encoder cannot be compiled"):
        patch.compile(model)


def test_what_it_does_not_take(small_net):
    for net, message in (
        ({"decoder": EOMT | {"n_blocks": 4}}, "queries join the last 4 blocks, the encoder has 3"),
        ({"backbone": "eva02_tiny_patch14_224", "patch_size": 14, "image_size": 28}, "eomt takes a VisionTransformer"),
    ):
        with pytest.raises(ValueError, match=message):
            create_segmenter(small_net | {"decoder": EOMT} | net)


@pytest.mark.slow
def test_it_trains_and_every_command_takes_it(few_shapes, tmp_path, call):
    folder, common = tmp_path / "eomt", ("--epochs", 1, "--batch-size", 4, "--num-workers", 0, *DEVICE)
    start = ("--dataset", "shapes", "--backbone", "vit_tiny_patch16_384", "--no-pretrained", "--patch-size", 8)
    start += ("--d-model", 32, "--n-heads", 2, "--n-layers", 3, "--crop-size", 32, "--im-size", 32)
    call(train, "--log-dir", folder, *start, "--decoder", "eomt", "--decoder-blocks", 1, *common)
    run = Run.load(folder, device="cpu")
    assert run.model.encoder.n_query_blocks == 1 and run.model.decoder.n_queries == 100
    merging = ("--patch-type", "graph", "--selected-layer", 2, "--threshold", 0.5)
    call(train, "--log-dir", tmp_path / "merged", "--finetune", folder, "--freeze-encoder", *merging, *common)
    before, after = (Run.load(tmp_path / name, device="cpu").model.encoder for name in ("eomt", "merged"))
    assert torch.equal(before.pos_embed, after.pos_embed) and not torch.equal(before.queries, after.queries)
    for options in ((), merging):
        assert "mean_iou" in call(test, folder, "--max-images", 2, *DEVICE, *options)
        assert "encoder" in call(flops, folder, "shapes", "--enc-dec", "--max-images", 1, *DEVICE, *options)
        call(speedtest, folder, "shapes", "--repeats", 1, "--warmup", 1, "--max-images", 2, *DEVICE, *options)
    photo = tmp_path / "photo.png"
    assert cv2.imwrite(str(photo), create_dataset("shapes", "val", image_size=(32, 32))[0].image[..., ::-1])
    for layer in (0, 2):  # without queries, and with them
        call(show_attn_map, folder, photo, tmp_path / "maps", "shapes", "--layer-id", layer, *DEVICE)
        assert len([*(tmp_path / f"maps/photo/enc_layer{layer}/cls").iterdir()]) == 4
    call(report, folder, "--out", tmp_path / "page.html", "--cost-images", 1, "--max-images", 1, *DEVICE)
