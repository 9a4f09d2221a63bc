"""Putting a method into a Segmenter and taking it out again."""

import copy

import pytest
import torch

import g2tm
import patch
from g2tm import Reduction
from patch.registry import METHODS
from segm.model.factory import create_segmenter

ATTENTION = {"none": "none", "prop": "proportional", "iprop": "inverse"}


def same_partition(a, b):
    """Whether two assignments, (N,) each, group alike."""
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len({p for p, _ in pairs}) == len({q for _, q in pairs})


def check_case(model, cases, case_settings, name):
    """Logits, token counts and partitions of a conformance case."""
    images = cases["x1" if name.endswith("b1") else "x2"]
    torch.testing.assert_close(model(images)[..., ::8, ::8], cases[f"{name}.logits"], atol=1e-4, rtol=0)
    reduction, tokens = patch.reduction(model), case_settings[name]["tokens"]
    assert reduction.counts.tolist() == (tokens if isinstance(tokens, list) else [tokens] * len(images))
    for image, expected in enumerate(cases[f"{name}.assignment"].view(-1, 144)):
        assert same_partition(reduction.assignment[image], expected)


METHOD_SETTINGS = {
    "graph": {"threshold": 0.2},
    "algm": {"layers": [1, 3], "threshold": 0.1},
    "tome": {"r": 2},
}


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
    check_case(golden_model, cases, case_settings, name)


@pytest.mark.parametrize("threshold", [0.85, 0.95])
@pytest.mark.parametrize("layers", [[1], [1, 5]])
@pytest.mark.parametrize("batch", ["b1", "b2"])
@torch.inference_mode()
def test_algm_reproduces_the_published_outputs(golden_model, cases, case_settings, threshold, layers, batch):
    name = f"algm.{'clap-l1' if layers == [1] else 'l1-5'}.t{threshold}.{batch}"
    patch.segmenter(golden_model, "algm", layers=layers, threshold=threshold, batch="uniform")
    check_case(golden_model, cases, case_settings, name)
    if f"{name}.size" in cases:  # in the published token order
        expected = cases[f"{name}.size"].view(len(patch.reduction(golden_model).sizes), -1)[:, 1:]
        torch.testing.assert_close(patch.reduction(golden_model).sizes, expected)


@pytest.mark.parametrize(("r", "mode"), [(6, "prop"), (6, "none"), (16, "prop")])
@pytest.mark.parametrize("batch", ["b1", "b2"])
@torch.inference_mode()
def test_tome_reproduces_the_published_outputs(golden_model, cases, case_settings, r, mode, batch):
    patch.segmenter(golden_model, "tome", r=r, attention=ATTENTION[mode])
    check_case(golden_model, cases, case_settings, f"tome.segmenter.r{r}.{mode}.{batch}")


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
@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_a_ragged_batch_equals_its_images(model, method, attention):
    patch.segmenter(model, method, attention=attention, **METHOD_SETTINGS[method])
    images = torch.randn(3, 3, 32, 32) * torch.tensor([0.2, 1.0, 3.0]).view(3, 1, 1, 1)
    together = model(images)
    assert method == "tome" or len(set(patch.reduction(model).counts.tolist())) > 1
    alone = torch.cat([model(image.unsqueeze(0)) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_gradients_pass_the_merge(model, method):
    patch.segmenter(model.train(), method, attention="proportional", **METHOD_SETTINGS[method])
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    wanted = {name for name, p in model.named_parameters() if p.requires_grad}
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    # A bias before a LayerNorm or of the keys may get an exact 0; whole blocks may not.
    assert {name for name in wanted - reached if not name.endswith("bias")} == set()


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_gradients_of_the_merged_model_are_right(small_net, method):
    """In double precision, with respect to the position embedding: every patch token is reached."""
    model = create_segmenter(small_net | {"image_size": [16, 32], "d_model": 8, "n_layers": 3}).double().eval()
    options = METHOD_SETTINGS[method] | ({} if method == "tome" else {"threshold": -0.2})
    patch.segmenter(model, method, attention="proportional", **options)
    images, embedding = torch.randn(1, 3, 16, 32).double(), model.encoder.pos_embed.detach().clone()

    def scores(embedding):
        parameters = {"encoder.pos_embed": embedding}
        return torch.func.functional_call(model, parameters, (images,))[..., ::8, ::8]

    assert torch.autograd.gradcheck(scores, embedding.requires_grad_(), fast_mode=True)
    assert patch.reduction(model).counts.item() < 8
    (gradient,) = torch.autograd.grad(scores(embedding).square().sum(), embedding)
    assert (gradient.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_mixed_precision_and_drop_path(small_net, method):
    model = create_segmenter(small_net | {"drop_path_rate": 0.5}).train()
    patch.segmenter(model, method, attention="proportional", **METHOD_SETTINGS[method])
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, 3, 32, 32)).float().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("method", METHOD_SETTINGS)
def test_selection_is_in_float32_under_autocast(method):
    """bfloat16 similarities would change partitions."""
    tokens = torch.nn.functional.avg_pool2d(torch.randn(4, 24, 20, 20), 5, 1, 2).flatten(2).transpose(1, 2)
    merge = {
        "graph": lambda: g2tm.graph_merge(tokens, (20, 20), 0.85),
        "algm": lambda: g2tm.clap(tokens, (20, 20), 0.85),
        "tome": lambda: g2tm.bipartite(tokens, threshold="adaptive", layer=3, prefix=0),
    }[method]
    expected = merge()
    with torch.autocast("cpu", torch.bfloat16):
        merged = merge()
    assert torch.equal(merged.assignment, expected.assignment)
    assert expected.counts.min() > 1 and expected.counts.max() < 400


def test_gradient_checkpointing_is_refused(model):
    model.encoder.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="checkpointing"):
        patch.segmenter(model, "graph")
    model.encoder.set_grad_checkpointing(False)
    patch.segmenter(model, "graph").encoder.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="checkpointing"):
        model(torch.randn(1, 3, 32, 32))


def test_what_is_no_segmenter_is_refused(model):
    with pytest.raises(ValueError, match=r"patch\.timm"):
        patch.segmenter(model.encoder, "graph")


def test_algm_merges_later_in_deep_models():
    """Layer 5 in ViT-T/S/B, 7 in ViT-L."""
    for depth, layers in ((12, (1, 5)), (24, (1, 7))):
        assert patch.check("algm", depth, (32, 32))["layers"] == layers


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
        ("graph", {"backend": "cuda"}, "scipy"),
        ("graph", {"layers": [True]}, "1 to 3"),
        ("algm", {"layers": [1, 2], "window": (5, 5)}, "larger than the grid"),
        ("algm", {"layers": [1, 2], "window": (1, 1)}, "at least two"),
        ("algm", {"layers": [1, 2], "gbm_threshold": "auto"}, "adaptive, tau"),
        ("algm", {"layers": [1, 2], "gbm_threshold": 1.5}, "-1 to 1"),
        ("algm", {"layers": [2, 2]}, "ascending"),
        ("tome", {"r": -1}, "0 or more"),
        ("tome", {"r": [1, 2]}, "3 layers"),
        ("tome", {"r": (4, 2.0)}, "inflection"),
        ("tome", {"r": (4, "a")}, "inflection"),
        ("algm", {"layers": [1, 2], "window": 2}, "height and width"),
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
        return Reduction(assignment, torch.full((n_images,), width), [width] * n_images, step.sizes)

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


@torch.inference_mode()
def test_algm_alone_in_every_layer_and_with_a_fixed_threshold(model):
    images = torch.randn(2, 3, 32, 32)
    for options in ({"window": None, "layers": [1, 2, 3]}, {"layers": [1, 2, 3], "gbm_threshold": "tau"}):
        patch.segmenter(model, "algm", threshold=-1.0, **options)
        assert model(images).shape == (2, 5, 32, 32)
        counts = patch.reduction(model).counts.tolist()
        if "gbm_threshold" in options:  # 16 patches: four windows, then all that may merge: 2, then 1
            assert counts == [1, 1]
        patch.remove(model)


@torch.inference_mode()
def test_algm_is_uniform_in_training_and_ragged_at_inference(model):
    images = torch.randn(3, 3, 32, 32) * torch.tensor([0.2, 1.0, 3.0]).view(3, 1, 1, 1)
    patch.segmenter(model, "algm", **METHOD_SETTINGS["algm"])
    model.train()(images)
    assert len(set(patch.reduction(model).counts.tolist())) == 1
    model.eval()(images)
    assert len(set(patch.reduction(model).counts.tolist())) > 1


@pytest.mark.parametrize(
    ("r", "removed"), [(4, [4, 4, 4]), ([1, 0, 3], [1, 0, 3]), ((4, 1.0), [0, 4, 8]), ((4, -0.5), [6, 4, 2])]
)
def test_schedules_of_tome(r, removed):
    from patch.methods import scheduled_r

    assert [scheduled_r(r, layer, 3) for layer in (1, 2, 3)] == removed


@torch.inference_mode()
def test_tome_never_removes_more_than_half(model):
    patch.segmenter(model, "tome", r=100)
    model(torch.randn(1, 3, 32, 32))
    assert patch.reduction(model).counts.item() == 2  # 16, 8, 4, 2


@torch.inference_mode()
def test_similarities_are_those_after_attention(model):
    seen, images = [], torch.randn(2, 3, 32, 32)
    handle = model.encoder.blocks[1].norm2.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0][:, 1:]))
    with patch.similarities(model.encoder, [2]) as moments:
        model(images)
        model(images)
    handle.remove()
    unit = torch.nn.functional.normalize(seen[0].double(), dim=-1)
    i, j = torch.triu_indices(16, 16, 1)
    cosines = (unit @ unit.transpose(1, 2))[:, i, j]
    torch.testing.assert_close(moments[2][1], 2 * cosines.sum(), atol=1e-9, rtol=1e-9)
    model(images)
    assert moments[2][0] == 4 * 120
    with pytest.raises(ValueError, match="1 to 3"), patch.similarities(model.encoder, [4]):
        pass
