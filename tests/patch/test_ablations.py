"""The options of ALGM's ablations, which every method has that merges groups of alike tokens."""

import pytest
import torch

import g2tm
import patch
from patch.methods.common import GROUPING
from segm.merging import parse
from tests.families import segmenter, vit
from tests.helpers import different_images
from tests.patch.test_exporting import exported

GROUPS = {name: {} for name, method in patch.METHODS.items() if GROUPING.keys() <= method.options.keys()}
GROUPS |= {"graph": {"layers": [2], "threshold": 0.5}, "keymatch": {"layers": [2], "tokens": 9}}
GROUPS |= {"algm": {"layers": [1, 2], "threshold": 0.5}, "tome": {"r": 4}, "crossget": {"r": 4}, "pitome": {"r": 4}}
GROUPS |= {"atc": {"layers": [2]}}


def recorded(module):
    """A list to which the inputs and outputs of a module are added."""
    seen = []
    module.register_forward_hook(lambda own, inputs, output: seen.append((inputs[0], output)))
    return seen


def test_those_who_compare_tokens_have_all_of_them():
    assert {"graph", "algm", "keymatch", "tome"} <= GROUPS.keys()
    given = parse(["--patch-type", "algm", "--metric", "queries", "--merge-after", "mlp", "--representative", "random"])
    assert given == {"patch_type": "algm", "metric": "queries", "after": "mlp", "representative": "random"}
    for name in GROUPS:
        own = patch.check(name, 12, (4, 4))
        assert (own["after"], own["representative"]) == ("attention", "mean")
        assert own["metric"] == ("tokens" if name in ("graph", "algm") else "keys")


@torch.inference_mode()
@pytest.mark.parametrize("name", GROUPS)
def test_a_random_token_stands_for_its_group(name):
    """One that is there, the same for an image in a batch and alone; not always the first one."""
    images, model = different_images(), patch.apply(vit(), name, **GROUPS[name], representative="random")
    whole = model.forward_features(images)
    reduction = patch.reduction(model)
    x = torch.randn(3, 16, 8)
    tokens, sizes = reduction.merge(x), reduction.sizes
    for image in range(3):
        for token in range(int(reduction.counts[image])):
            members = x[image][reduction.assignment[image] == token]
            assert len(members) == sizes[image, token] and (members == tokens[image, token]).all(-1).sum() == 1
    for image in range(3):
        alone = model.forward_features(images[image : image + 1])
        torch.testing.assert_close(alone[0], whole[image], atol=1e-4, rtol=1e-4)


def test_which_token_that_is_goes_by_chance():
    groups = g2tm.Grouping.of_length(torch.arange(64).expand(2, -1) // 4, 16)
    x = torch.arange(64.0).expand(2, -1)[..., None]
    chosen = [g2tm.random_members(groups, seed).merge(x)[0, :, 0].long() % 4 for seed in range(50)]
    shares = torch.stack(chosen).flatten().bincount(minlength=4) / 800
    assert shares.min() > 0.2 and shares.max() < 0.3
    assert torch.equal(g2tm.random_members(groups, 3).merge(x)[0], g2tm.random_members(groups, 3).merge(x)[1])


@torch.inference_mode()
def test_tokens_that_are_padding_stand_for_nothing():
    x, padding = torch.randn(2, 6, 4), torch.arange(6) >= torch.tensor([[6], [3]])
    groups = g2tm.Grouping.of_counts(
        torch.tensor([[0, 0, 1, 1, 2, 2], [0, 0, 1, 9, 9, 9]]), torch.tensor([3, 2]), None, padding
    )
    for seed in range(10):
        chosen = g2tm.random_members(groups, seed)
        assert chosen.merge(x)[1, 0].tolist() in x[1, :2].tolist() and not chosen.merge(x)[1, 2].any()
        assert torch.equal(chosen.sizes, groups.sizes)


@torch.inference_mode()
@pytest.mark.parametrize("name", GROUPS)
def test_after_the_mlp_the_output_of_the_block_merges(name):
    images, plain = different_images(), vit()
    options = {"layers": [2]} | ({"tokens": 13} if patch.find(name).takes("tokens") else {})
    whole, merged = recorded(plain.blocks[1]), recorded(plain.blocks[2])
    plain.forward_features(images)
    patch.apply(plain, name, **GROUPS[name] | options, after="mlp")
    plain.forward_features(images)
    (_, output), (got, _) = whole[0], merged[1]
    assert got.shape[1] < 17  # CLS and the patches
    torch.testing.assert_close(got[:, 1:], patch.reduction(plain).merge(output[:, 1:]), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("metric", ["keys", "queries", "values"])
def test_the_metric_chooses(metric):
    """Against vectors by hand from the projection of the layer."""
    images, model = different_images(2), vit()
    seen = recorded(model.blocks[1].attn.qkv)
    model.forward_features(images)
    heads = seen[0][1].unflatten(-1, (3, 2, 16))[:, 1:, ("queries", "keys", "values").index(metric)].mean(2)
    patch.apply(model, "graph", layers=[2], threshold=0.5, metric=metric).forward_features(images)
    expected = g2tm.graph_merge(heads, (4, 4), 0.5)
    assert torch.equal(patch.reduction(model).assignment, expected.assignment)
    patch.apply(patch.remove(model), "algm", layers=[2], threshold=0.5, metric=metric).forward_features(images)
    assert torch.equal(patch.reduction(model).assignment, g2tm.clap(heads, (4, 4), 0.5).assignment)


@torch.inference_mode()
def test_averaging_without_reduction_is_proportional_attention():
    """k equal tokens weigh in attention as one of size k does; ALGM, table 10c, averages and keeps them all."""
    images, model = different_images(2), vit()
    x = model.norm_pre(model._pos_embed(model.patch_embed(images)))
    for index, block in enumerate(model.blocks):
        x = x + block.attn(block.norm1(x))
        if index == 1:
            step = g2tm.graph_merge(x[:, 1:], (4, 4), None, tokens=9)
            x = torch.cat([x[:, :1], step.unmerge(step.merge(x[:, 1:]))], dim=1)
        x = x + block.mlp(block.norm2(x))
    patch.apply(model, "graph", layers=[2], tokens=9, attention="proportional")
    torch.testing.assert_close(model.forward_features(images), model.norm(x), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@torch.inference_mode(False)
def test_onnx_takes_them(tmp_path):
    options = {"metric": "queries", "after": "mlp", "representative": "random"}
    images, model = different_images(2), patch.apply(vit(), "algm", layers=[1, 2], tokens=9, **options)
    with torch.no_grad():
        own = model(images / 2)
    torch.testing.assert_close(exported(model, images, tmp_path)(images / 2), own, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_compiled_is_refused():
    model = patch.apply(segmenter(), "graph", layers=[2], metric="keys", after="mlp")
    with pytest.raises(ValueError, match=r"after the MLP .* cannot be compiled: give metric='tokens'"):
        patch.compile(model, backend="eager")
    images = different_images(2)
    model = patch.apply(patch.remove(model), "graph", layers=[2], threshold=0.5, after="mlp", representative="random")
    expected = model(images)
    torch.testing.assert_close(patch.compile(model, backend="eager")(images), expected, atol=1e-4, rtol=1e-4)
