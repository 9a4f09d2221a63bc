"""Putting a method into a Segmenter and taking it out again."""

import copy

import pytest
import torch

import patch
from g2tm import Reduction
from patch.registry import METHODS
from segm.model.factory import create_segmenter

ATTENTION = {"none": "none", "prop": "proportional", "iprop": "inverse"}


def same_partition(a, b):
    """Whether two assignments, (N,) each, group alike."""
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len({p for p, _ in pairs}) == len({q for _, q in pairs})


@pytest.fixture
def model(small_net):
    return create_segmenter(small_net).eval()


@pytest.mark.parametrize("threshold", [0.85, 0.95])
@pytest.mark.parametrize("mode", ATTENTION)
@pytest.mark.parametrize("batch", ["b1", "b2"])
@torch.inference_mode()
def test_graph_reproduces_the_published_outputs(golden_model, cases, case_settings, threshold, mode, batch):
    name = f"graph.l2.t{threshold}.{mode}.{batch}"
    patch.segmenter(golden_model, "graph", layers=[2], threshold=threshold, attention=ATTENTION[mode])
    logits = golden_model(cases["x1" if batch == "b1" else "x2"])[..., ::8, ::8]
    torch.testing.assert_close(logits, cases[f"{name}.logits"], atol=1e-4, rtol=0)
    reduction, tokens = patch.reduction(golden_model), case_settings[name]["tokens"]
    assert reduction.counts.tolist() == (tokens if isinstance(tokens, list) else [tokens])
    for image, expected in enumerate(cases[f"{name}.assignment"].view(-1, 144)):
        assert same_partition(reduction.assignment[image], expected)


@torch.inference_mode()
def test_remove_restores_bit_identical_outputs(model):
    images, keys = torch.randn(2, 3, 32, 48), list(model.state_dict())
    before, attributes = model(images), set(vars(model))
    parameters = [id(p) for p in model.parameters()]
    patch.segmenter(model, "graph", threshold=0.1, attention="proportional")
    assert not torch.equal(model(images), before)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    patch.remove(model)
    assert torch.equal(model(images), before)
    assert set(vars(model)) == attributes and not model.encoder.patch_embed._forward_hooks
    patch.remove(model)  # of an unpatched model: nothing happens


@torch.inference_mode()
def test_threshold_one_merges_nothing(model):
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    patch.segmenter(model, "graph", threshold=1.0)
    torch.testing.assert_close(model(images), before)
    assert patch.reduction(model).counts.tolist() == [16, 16]


@torch.inference_mode()
@pytest.mark.parametrize("size", [(32, 64), (40, 24), (33, 45)])
def test_rectangular_and_padded_images(model, size):
    patch.segmenter(model, "graph", threshold=0.2)
    images = torch.randn(2, 3, *size)
    assert model(images).shape == (2, 5, *size)
    assert model.predict(images).shape == (2, *size)
    grid = [-(-side // 8) for side in size]
    assert patch.reduction(model).assignment.shape == (2, grid[0] * grid[1])


@torch.inference_mode()
@pytest.mark.parametrize("attention", ["none", "proportional", "inverse"])
def test_a_ragged_batch_equals_its_images(model, attention):
    patch.segmenter(model, "graph", threshold=0.2, attention=attention)
    images = torch.randn(3, 3, 32, 32) * torch.tensor([0.2, 1.0, 3.0]).view(3, 1, 1, 1)
    together = model(images)
    assert len(set(patch.reduction(model).counts.tolist())) > 1
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_gradients_pass_the_merge(model):
    patch.segmenter(model.train(), "graph", threshold=0.2, attention="proportional")
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # A bias before a LayerNorm or of the keys may get an exact 0; whole blocks may not.
    assert {name for name in wanted - reached if not name.endswith("bias")} == set()


def test_mixed_precision_and_drop_path(small_net):
    model = create_segmenter(small_net | {"drop_path_rate": 0.5}).train()
    patch.segmenter(model, "graph", threshold=0.2, attention="proportional")
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 32, 32)).float().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.inference_mode()
def test_a_copy_of_a_patched_model_is_independent(model):
    patch.segmenter(model, "graph", threshold=0.2)
    twin, images = copy.deepcopy(model), torch.randn(1, 3, 32, 32)
    expected = model(images)
    patch.remove(model)
    assert torch.equal(twin(images), expected)
    assert patch.reduction(twin).sizes.sum() == 16


@torch.inference_mode()
def test_attention_of_a_patched_model_has_the_merged_tokens(model):
    patch.segmenter(model, "graph", threshold=0.2, attention="proportional")
    images = torch.randn(1, 3, 32, 32)
    weights = model.attention(images, 2)
    kept = 1 + patch.reduction(model).counts.item()
    assert weights.shape[-2:] == (kept, kept)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert model.attention(images, 0, "decoder").shape[-1] == kept - 1 + 5
    assert model.attention(images, 0).shape[-1] == 17  # before the merge


@torch.inference_mode()
def test_set_threshold(model):
    patch.segmenter(model, "graph", threshold=1.0)
    patch.set_threshold(model, -1.0)
    model(torch.randn(1, 3, 32, 32))
    assert patch.settings(model)["threshold"] == -1.0
    with pytest.raises(ValueError, match="-1 to 1"):
        patch.set_threshold(model, 2.0)
    assert patch.settings(model)["threshold"] == -1.0


@pytest.mark.parametrize(
    ("method", "options", "allowed"),
    [
        ("nosuch", {}, "graph"),
        ("graph", {"layers": [4]}, "1 to 3"),
        ("graph", {"layers": [0]}, "1 to 3"),
        ("graph", {"layers": [1, 2]}, "one layer"),
        ("graph", {"layers": [2, 1]}, "ascending"),
        ("graph", {"threshold": 1.01}, "-1 to 1"),
        ("graph", {"attention": "prop"}, "proportional"),
        ("graph", {"batch": "even"}, "ragged"),
        ("graph", {"r": 8}, "threshold"),
    ],
)
def test_bad_options_are_refused_before_anything_changes(model, method, options, allowed):
    with pytest.raises(ValueError, match=allowed):
        patch.segmenter(model, method, **options)
    assert not patch.is_patched(model) and type(model.encoder.blocks[0]).__name__ == "Block"


def test_patching_twice_and_asking_the_unpatched_are_refused(model):
    for ask in (patch.reduction, patch.settings):
        with pytest.raises(ValueError, match=r"patch\.segmenter"):
            ask(model)
    patch.segmenter(model, "graph")
    with pytest.raises(ValueError, match=r"patch\.remove"):
        patch.segmenter(model, "graph")


def test_unknown_blocks_are_refused(small_net):
    model = create_segmenter(small_net)
    model.encoder.blocks[1].__class__ = type("Strange", (type(model.encoder.blocks[1]),), {})
    with pytest.raises(ValueError, match="Strange"):
        patch.segmenter(model, "graph")


@pytest.fixture
def halves():
    """A registered method that merges neighbouring pairs of tokens in the layers it is given."""

    def merge(step):
        n_images, n_tokens = step.x.shape[:2]
        assignment = (torch.arange(n_tokens) // 2).expand(n_images, -1)
        width = -(-n_tokens // 2)
        return Reduction(assignment, torch.full((n_images,), width), width, step.sizes)

    patch.register("halves", merge, layers=(1, 3))
    yield "halves"
    del METHODS["halves"]


@torch.inference_mode()
def test_a_registered_method_works_and_composes(model, halves):
    patch.segmenter(model, halves, attention="proportional")
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 5, 32, 32)
    reduction = patch.reduction(model)
    assert reduction.counts.tolist() == [4, 4]
    assert torch.equal(reduction.sizes, torch.full((2, 4), 4.0))
    with pytest.raises(ValueError, match="already"):
        patch.register(halves, lambda step: None)
