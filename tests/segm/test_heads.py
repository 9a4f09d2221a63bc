"""Decoders that read blocks of the encoder as maps: alone, with every method, and in the commands."""

import copy
import json

import pytest
import torch

import patch
from segm import flops, report, speedtest, test, train
from segm.losses import Objective, segvit_loss
from segm.merging import count_tokens
from segm.model.decoder import LinearBN
from segm.model.factory import create_segmenter
from segm.model.masks import Prediction, SegViT, class_scores
from segm.run import Run
from tests.helpers import METHOD_OPTIONS, by_speed, different_images, few_and_all, with_parts

HEADS = {"last": {"name": "linear_bn"}, "three": {"name": "linear_bn", "n_blocks": 3}}
HEADS |= {name: {"name": name} for name in ("setr_naive", "setr_pup", "setr_mla", "upernet", "segvit")}
AUXILIARY = {"setr_naive": 3, "setr_pup": 3, "setr_mla": 4, "upernet": 1}
FAMILIES = {  # beside timm's plain ViT with a CLS token
    "distilled": {"backbone": "deit_tiny_distilled_patch16_224", "distilled": True},
    "registers": {"backbone": "vit_small_patch14_reg4_dinov2"},
    "no CLS": {"backbone": "vit_base_patch16_siglip_224"},
    "rotary": {"backbone": "eva02_tiny_patch14_224"},
    "rotary, registers": {"backbone": "vit_small_patch16_dinov3"},
}
DEVICE = ("--device", "cpu")
CPU = torch.device("cpu")


@pytest.fixture(params=by_speed(HEADS, ["last", "three", "segvit"], ["setr_naive", "setr_pup", "setr_mla", "upernet"]))
def model(request, small_net):
    net = create_segmenter(small_net | {"decoder": HEADS[request.param]}).eval()
    last = net.decoder.head if hasattr(net.decoder, "head") else net.decoder.conv_seg
    torch.nn.init.normal_(last.weight)
    for module in net.decoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    return net


def test_batch_norm_and_one_layer_on_the_last_blocks():
    head = LinearBN(4, 3, depth=6, n_blocks=2).eval()
    assert head.reads == [4, 5]
    head.bn.running_mean.normal_()
    head.bn.running_var.uniform_(0.5, 2)
    maps = [torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6)]
    both = torch.cat(maps, 1).permute(0, 2, 3, 1)
    expected = (both - head.bn.running_mean) / (head.bn.running_var + 1e-5).sqrt() @ head.head.weight[:, :, 0, 0].T
    torch.testing.assert_close(head(maps).permute(0, 2, 3, 1), expected, atol=1e-5, rtol=1e-5)
    for n_blocks in (0, 7):
        with pytest.raises(ValueError, match="encoder has 6"):
            LinearBN(4, 3, depth=6, n_blocks=n_blocks)


@torch.inference_mode()
def test_segvit_attends_and_adds_up_masks():
    head = SegViT(128, 3, depth=12, patch_side=4, n_layers=2).eval()
    assert head.reads == [11, 7, 5] and SegViT(128, 3, depth=24, patch_side=4).reads == [23, 15, 7]
    maps = [torch.randn(2, 128, 3, 5) for _ in range(3)]
    queries, total = head.query.expand(2, -1, -1), 0
    for features, project, layers in zip(maps, head.inputs, head.stages, strict=True):
        tokens = project(features.flatten(2).mT)
        for layer in layers:
            queries = layer.norm1(queries + layer.self_attn(queries, queries, queries)[0])
            cross = torch.nn.MultiheadAttention(64, 2, batch_first=True).eval()
            cross.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.k.weight, layer.v.weight]))
            cross.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.k.bias, layer.v.bias]))
            cross.out_proj.load_state_dict(layer.proj.state_dict())
            out, weights = cross(queries, tokens, tokens, average_attn_weights=False)
            scores = torch.stack(
                [
                    layer.q(queries)[..., part] @ layer.k(tokens)[..., part].mT / 32**0.5
                    for part in (slice(32), slice(32, 64))
                ]
            )
            torch.testing.assert_close(scores.softmax(-1).transpose(0, 1), weights, atol=1e-5, rtol=1e-5)
            queries = layer.norm2(queries + out)
            queries = layer.norm3(queries + layer.mlp(queries))
        total = total + scores.mean(0).view(2, 3, 3, 5)
    masks = torch.nn.functional.interpolate(total, size=(12, 20), mode="bilinear").sigmoid()
    presence = head.head(queries).softmax(-1)
    expected = sum(presence[:, q, :3, None, None] * masks[:, q, None] for q in range(3))
    torch.testing.assert_close(class_scores(head(maps)[-1], (12, 20)), expected, atol=1e-5, rtol=1e-5)


def test_the_loss_of_segvit_says_what_is_there_and_where():
    labels = torch.tensor([[[0, 0, 2, 255], [0, 2, 2, 255]], [[1, 1, 1, 1], [1, 1, 1, 1]]])
    stages = [Prediction(torch.randn(2, 3, 4, requires_grad=True), torch.randn(2, 3, 2, 4)) for _ in range(2)]
    expected = 0
    for classes, masks in stages:
        total, weights = 0, 0
        for image, there in enumerate(({0, 2}, {1})):
            for query in range(3):
                target, weight = (query, 1.0) if query in there else (3, 0.1)
                total, weights = total - weight * classes[image, query].log_softmax(-1)[target], weights + weight
        expected = expected + total / weights
        for image, query in ((0, 0), (0, 2), (1, 1)):
            pixels = [(y, x) for y in range(2) for x in range(4) if labels[image, y, x] != 255]
            p = torch.stack([masks[image, query, y, x].sigmoid() for y, x in pixels])
            g = torch.tensor([float(labels[image, y, x] == query) for y, x in pixels])
            right = p * g + (1 - p) * (1 - g)
            focal = (-(0.25 * g + 0.75 * (1 - g)) * (1 - right) ** 2 * right.log()).mean()
            dice = 1 - (2 * (p * g).sum() + 1) / (p.sum() + g.sum() + 1)
            expected = expected + (20 * focal + dice) / 3
    found = segvit_loss(stages, labels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    nothing = segvit_loss(stages, torch.full_like(labels, 255))
    nothing.backward()
    assert nothing > 0 and stages[0].classes.grad.isfinite().all()


@pytest.mark.slow
def test_segvit_learns(small_net):
    model = create_segmenter(small_net | {"decoder": {"name": "segvit", "dropout": 0.0}})
    images, labels = torch.randn(2, 3, 32, 32), torch.zeros(2, 32, 32, dtype=torch.int64)
    images[:, :, :, 16:] += 3
    labels[:, :, 16:] = 3
    optimizer = torch.optim.AdamW(model.parameters(), 0.003)
    for _ in range(60):
        optimizer.zero_grad()
        segvit_loss(*model.training_outputs(images), labels).backward()
        optimizer.step()
    assert (model.eval().predict(images) == labels).float().mean() > 0.95
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


@torch.inference_mode()
def test_it_reads_blocks_before_the_last_norm(model):
    images, seen = torch.randn(2, 3, 32, 32), []
    handles = [block.register_forward_hook(lambda m, x, y: seen.append(y)) for block in model.encoder.blocks]
    maps = model.maps(images)
    for handle in handles:
        handle.remove()
    for found, index in zip(maps, model.decoder.reads, strict=True):
        assert torch.equal(found.flatten(2).mT, seen[index][:, 1:])
    assert count_tokens(model, images).tolist() == [16, 16]  # patches, however fine the logits are
    for size in ((33, 45), (40, 24)):
        images = torch.randn(2, 3, *size)
        logits, labels = model(images), model.predict(images)
        assert logits.shape == (2, 5, *size) and (labels == logits.argmax(1)).float().mean() > 0.999


@pytest.mark.parametrize("methods", few_and_all())
@torch.inference_mode()
def test_every_method_gives_the_head_all_patches(model, methods):
    images = different_images()
    plain = model(images)
    patch.apply(model, "graph", layers=[2], threshold=1.0)
    torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=1e-5)
    patch.remove(model)
    for method, options in ((name, METHOD_OPTIONS[name]) for name in methods):
        with_parts(model.encoder, method)
        patch.apply(model, method, **options)
        together = model(images)
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4, msg=lambda text, m=method: f"{m}: {text}")
        assert together.shape == plain.shape and patch.reduction(model).counts.max() < 16
        patch.remove(model)
        if method == "dtem":  # its parts lie in front of the projections
            torch.testing.assert_close(model(images), plain)
    patch.apply(model, "graph", threshold=0.2)
    with pytest.raises(ValueError, match="cannot be compiled"):
        patch.compile(model)


QUERIES = {"eomt": {"name": "eomt", "n_queries": 5, "n_blocks": 2}}
PAIRS = [(one, name) for one in FAMILIES for name in HEADS | ({} if "rotary" in one else QUERIES)]


@pytest.mark.parametrize(
    ("family", "head"), by_speed(PAIRS, slow=[("rotary, registers", "setr_mla"), ("registers", "eomt")])
)
@torch.inference_mode()
def test_every_method_with_every_head_on_every_family(family, head, small_net):
    images = different_images()
    model = create_segmenter(small_net | FAMILIES[family] | {"decoder": (HEADS | QUERIES)[head]}).eval()
    plain = model(images)
    patch.apply(model, "graph", layers=[2], threshold=1.0)
    torch.testing.assert_close(model(images), plain, atol=1e-5, rtol=1e-5)
    patch.remove(model)
    for method, options in METHOD_OPTIONS.items():
        one = copy.deepcopy(model)
        with_parts(one.encoder, method)
        if method == "diffrate" and (family == "no CLS" or head == "eomt"):
            continue
        patch.apply(one, method, **options)
        together = one(images)
        alone = torch.cat([one(image[None]) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4, msg=lambda text, m=method: f"{m}: {text}")
        assert together.shape == plain.shape, method
        most = 16 + 3 * (method == "clustvit")  # whose random clusters may leave all but a few
        assert patch.reduction(one).counts.max() < most, method


def fail(*_):
    raise AssertionError("an auxiliary head was called")


@pytest.mark.slow
def test_auxiliary_heads_train_beside_the_decoder_and_cost_nothing_later(small_net):
    images, labels = torch.randn(3, 3, 32, 32), torch.randint(0, 5, (3, 32, 32))
    for name, count in AUXILIARY.items():
        model = create_segmenter(small_net | {"decoder": {"name": name}})
        assert len(model.aux_heads) == count and len(model.training_outputs(images)) == 1 + count
        for one in model.training_outputs(images):
            assert one.shape == (3, 5, 32, 32)
        loss, _ = Objective(model)(images, labels, lambda: torch.tensor(labels.numel()))
        loss.backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert loss > 0 and without == [], name
        model.eval()
        for head in model.aux_heads:
            head.register_forward_hook(fail)
        model(images), model.predict(images)
    assert {"decoder.norm.weight", "decoder.up_convs.0.0.conv.weight", "decoder.conv_seg.weight"} <= set(
        create_segmenter(small_net | {"decoder": {"name": "setr_pup"}}).state_dict()
    )


@pytest.mark.slow
def test_it_trains_and_every_command_takes_it(few_shapes, tmp_path, call, refused):
    folder = tmp_path / "bn"
    common = ("--epochs", 1, "--batch-size", 4, "--num-workers", 0, *DEVICE)
    start = ("--dataset", "shapes", "--backbone", "vit_tiny_patch16_384", "--no-pretrained", "--patch-size", 8)
    start += ("--d-model", 32, "--n-heads", 2, "--n-layers", 3, "--crop-size", 32, "--im-size", 32)
    call(train, "--log-dir", folder, *start, "--decoder", "linear_bn", "--decoder-blocks", 2, *common)
    run = Run.load(folder, device="cpu")
    assert run.model.decoder.reads == [1, 2] and run.model.decoder.bn.num_batches_tracked > 0
    merging = ("--patch-type", "graph", "--selected-layer", 2, "--threshold", 0.5)
    call(train, "--log-dir", tmp_path / "merged", "--finetune", folder, *merging, *common)
    for options in ((), merging):
        assert "mean_iou" in call(test, folder, "--max-images", 2, *DEVICE, *options)
        assert "encoder" in call(flops, folder, "shapes", "--enc-dec", "--max-images", 1, *DEVICE, *options)
        call(speedtest, folder, "shapes", "--repeats", 1, "--warmup", 1, "--max-images", 2, *DEVICE, *options)
    call(
        report,
        folder,
        tmp_path / "merged",
        "--out",
        tmp_path / "page.html",
        "--cost-images",
        1,
        "--max-images",
        1,
        *DEVICE,
    )
    assert len(json.loads((tmp_path / "page.json").read_text())["rows"]) == 2
    call(train, "--log-dir", tmp_path / "setr", *start, "--decoder", "setr_naive", *merging, *common)
    assert "mean_iou" in call(test, tmp_path / "setr", "--max-images", 2, *DEVICE)
    assert "reads other features" in refused(
        train, "--log-dir", tmp_path / "c", "--finetune", folder, "--freeze-encoder", "--cache-features", 1, *common
    )
    call(train, "--log-dir", tmp_path / "segvit", *start, "--decoder", "segvit", *merging, *common)
    assert "mean_iou" in call(test, tmp_path / "segvit", "--max-images", 2, *DEVICE)
    assert "--decoder-blocks" in refused(
        train, "--log-dir", tmp_path / "d", *start, "--decoder", "linear", "--decoder-blocks", 2, *common
    )
