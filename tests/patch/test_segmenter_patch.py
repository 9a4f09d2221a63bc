"""Putting a method into a Segmenter and taking it out again."""

import itertools

import pytest
import torch

import g2tm
import patch
from patch import look
from segm.model.factory import create_segmenter
from tests.helpers import METHOD_OPTIONS, RAGGED, different_images, options_for, with_parts

ATTENTION = {"none": "none", "prop": "proportional", "iprop": "inverse"}


def same_partition(a, b):
    """Whether two assignments, (N,) each, group alike."""
    pairs = set(zip(a.tolist(), b.tolist(), strict=True))
    return len(pairs) == len({p for p, _ in pairs}) == len({q for _, q in pairs})


def create(net, method, **options):
    """A patched Segmenter in evaluation mode, with learned parts where the method has some."""
    model = create_segmenter(net).eval()
    with_parts(model.encoder, method)
    return patch.apply(model, method, **options_for(method, **options))


@pytest.fixture
def model(small_net):
    return create_segmenter(small_net).eval()


@torch.inference_mode()
def test_remove_restores_the_model_exactly(model):
    images, keys = torch.randn(2, 3, 32, 48), list(model.state_dict())
    before, parameters = model(images), [id(p) for p in model.parameters()]
    attributes, classes = [set(vars(m)) for m in model.modules()], [type(m) for m in model.modules()]
    for method in METHOD_OPTIONS.keys() - {"dtem", "clustvit"}:
        patch.apply(model, method, **METHOD_OPTIONS[method])
        assert patch.is_patched(model) and patch.method(model) == method
        assert not torch.equal(model(images), before), method
        assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
        assert patch.remove(model) is model and not patch.is_patched(model)
        assert torch.equal(model(images), before), method
        assert [set(vars(m)) for m in model.modules()] == attributes
        assert [type(m) for m in model.modules()] == classes
    patch.remove(model)  # of an unpatched model: nothing happens


@torch.inference_mode()
def test_a_patched_model_stays_what_it_was(model):
    """By class and attribute, for whoever asks."""
    own = [type(m) for m in model.modules()]
    patch.apply(model, "graph")
    assert all(isinstance(m, cls) for m, cls in zip(model.modules(), own, strict=True))


@torch.inference_mode()
def test_threshold_one_merges_nothing(model):
    images = torch.randn(2, 3, 32, 32)
    before = model(images)
    patch.apply(model, "graph", threshold=1.0)
    torch.testing.assert_close(model(images), before)
    assert patch.reduction(model).counts.tolist() == [16, 16]


@torch.inference_mode()
def test_rectangular_and_padded_images(small_net):
    for method in METHOD_OPTIONS:
        model = create(small_net, method)
        for size in ((32, 64), (40, 24), (33, 45)):
            images = torch.randn(2, 3, *size)
            assert model(images).shape == (2, 5, *size)
            assert model.predict(images).shape == (2, *size)
            n_patches = -(-size[0] // 8) * -(-size[1] // 8)
            reduction = patch.reduction(model)
            width = small_net["d_model"]
            assert reduction.unmerge(torch.ones(*reduction.sizes.shape, width)).shape == (2, n_patches, width)
            assert max(reduction.lengths) < n_patches, method


@torch.inference_mode()
def test_a_ragged_batch_equals_its_images(small_net):
    images = different_images()
    for method, attention in itertools.product(METHOD_OPTIONS, ATTENTION.values()):
        model = create(small_net, method, attention=attention)
        together = model(images)
        assert (len(set(patch.reduction(model).lengths)) > 1) == (method in RAGGED), method
        alone = torch.cat([model(image.unsqueeze(0)) for image in images])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5, msg=lambda text, m=method: f"{m}: {text}")


@torch.inference_mode()
def test_a_uniform_batch_keeps_as_many_tokens_in_every_image(small_net):
    for method in set(RAGGED) - {"clustvit"}:  # it learns who stays
        model = create(small_net, method, batch="uniform")
        model(different_images())
        assert len(set(patch.reduction(model).lengths)) == 1 and patch.reduction(model).padding is None


def test_gradients_pass_the_merge(small_net):
    for method in METHOD_OPTIONS:
        model = create(small_net, method, attention="proportional").train()
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        wanted = {name for name, p in model.named_parameters() if p.requires_grad and "clusterer" not in name}
        reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        # A bias before a LayerNorm or of the keys may get an exact 0; whole blocks may not.
        assert {name for name in wanted - reached if not name.endswith("bias")} == set(), method


def test_gradients_of_the_merged_model_are_right(small_net, monkeypatch):
    """In double precision, with respect to the position embedding: every patch token is reached.

    MCTF weighs tokens by attention, through which no gradient shall flow: it is held fixed here.
    """

    def fixed(query, key, **rest):
        return torch.linspace(0.1, 0.2, query.shape[2]).repeat(len(query), 1)

    monkeypatch.setattr(look, "received_attention", fixed)
    net = small_net | {"image_size": [16, 32], "d_model": 8}
    for method in METHOD_OPTIONS:
        options = {"threshold": -0.2} if "threshold" in METHOD_OPTIONS[method] else {}
        options |= {"ltmp": {"tokens": 6}, "diffrate": {"prune_kept": [8, 7, 6], "merge_kept": [7, 6, 5]}}.get(
            method, {}
        )
        model = create(net, method, attention="proportional", **options).double()
        images, embedding = torch.randn(1, 3, 16, 32).double(), model.encoder.pos_embed.detach().clone()

        def logits(embedding, model=model, images=images):
            parameters = {"encoder.pos_embed": embedding}
            return torch.func.functional_call(model, parameters, (images,))[..., ::8, ::8]

        assert torch.autograd.gradcheck(logits, embedding.requires_grad_(), fast_mode=True), method
        assert patch.reduction(model).counts.item() < 8 or method == "clustvit"  # clusters without tokens count
        (gradient,) = torch.autograd.grad(logits(embedding).square().sum(), embedding)
        assert method == "tofu" or (gradient.abs().sum(-1) > 0).all(), method  # it drops tokens for good


def test_mixed_precision_and_drop_path(small_net):
    for method in METHOD_OPTIONS:
        model = create(small_net | {"drop_path_rate": 0.5}, method, attention="proportional").train()
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 3, 32, 32)).float().mean().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None), method


def test_selection_is_in_float32_under_autocast():
    """bfloat16 similarities would change partitions."""
    tokens = torch.nn.functional.avg_pool2d(torch.randn(4, 24, 20, 20), 5, 1, 2).flatten(2).transpose(1, 2)
    merges = {
        "graph": lambda: g2tm.graph_merge(tokens, (20, 20), 0.85),
        "clap": lambda: g2tm.clap(tokens, (20, 20), 0.85),
        "gbm": lambda: g2tm.bipartite(tokens, threshold="adaptive", layer=3, odd_first=False),
        "mpm": lambda: g2tm.mutual_pairs(tokens),
        "tofu": lambda: g2tm.tofu(tokens, r=100, prune=True, odd_first=False),
    }
    for name, merge in merges.items():
        expected = merge()
        with torch.autocast("cpu", torch.bfloat16):
            merged = merge()
        assert torch.equal(merged.assignment, expected.assignment), name
        assert expected.counts.min() > 1 and expected.counts.max() < 400, name


def test_gradient_checkpointing_is_refused(model):
    model.encoder.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="checkpointing"):
        patch.apply(model, "graph")
    model.encoder.set_grad_checkpointing(False)
    patch.apply(model, "graph").encoder.set_grad_checkpointing(True)
    with pytest.raises(ValueError, match="checkpointing"):
        model(torch.randn(1, 3, 32, 32))


def test_algm_merges_later_in_deep_models():
    """Layer 5 in ViT-T/S/B, 7 in ViT-L."""
    for depth, layers in ((12, (1, 5)), (24, (1, 7))):
        assert patch.check("algm", depth, (32, 32))["layers"] == layers


@torch.inference_mode()
def test_attention_of_a_patched_model_has_the_merged_tokens(model):
    patch.apply(model, "graph", threshold=0.2, attention="proportional")
    images = torch.randn(1, 3, 32, 32)
    weights = model.attention(images, 2)
    kept = 1 + patch.reduction(model).counts.item()
    assert weights.shape[-2:] == (kept, kept)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))
    assert model.attention(images, 0, "decoder").shape[-1] == kept - 1 + 5
    assert model.attention(images, 0).shape[-1] == 17  # before the merge


@torch.inference_mode()
def test_attention_is_shown_for_methods_that_look_at_it_too(small_net):
    images = torch.randn(1, 3, 32, 32)
    for method in ("tome", "tofu", "dtem"):
        weights = create(small_net, method).attention(images, 1)
        assert weights.shape[-1] == 15
        torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights.sum(-1)))


@torch.inference_mode()
def test_set_threshold(model):
    images = torch.randn(1, 3, 32, 32)
    patch.apply(model, "graph", threshold=1.0)
    patch.set_threshold(model, -1.0)
    model(images)
    assert patch.options(model)["threshold"] == -1.0 and patch.reduction(model).lengths == (1,)
    with pytest.raises(ValueError, match="-1 to 1"):
        patch.set_threshold(model, 2.0)
    assert patch.options(model)["threshold"] == -1.0
    patch.apply(patch.remove(model), "algm", layers=[1, 2], window=(0, 0), threshold=0.5)
    patch.set_threshold(model, 0.6)
    assert patch.options(model)["window"] is None and patch.options(model)["threshold"] == 0.6
    patch.apply(patch.remove(model), "tome")
    with pytest.raises(ValueError, match="tome has no threshold"):
        patch.set_threshold(model, 0.5)


def test_the_options_are_a_copy(model):
    patch.apply(model, "graph")
    patch.options(model)["threshold"] = 0.1
    assert patch.options(model)["threshold"] == 0.88


def test_bad_options_are_refused_before_anything_changes(model):
    refused = [
        ("nosuch", {}, "graph"),
        ("graph", {"layers": [4]}, "1 to 3"),
        ("graph", {"layers": [0]}, "1 to 3"),
        ("graph", {"layers": [1, 2]}, "one layer"),
        ("graph", {"layers": [2, 1]}, "ascending"),
        ("graph", {"layers": []}, "layers"),
        ("graph", {"threshold": 1.01}, "threshold 1.01.*-1 to 1"),
        ("graph", {"threshold": float("nan")}, "-1 to 1"),
        ("graph", {"threshold": "auto"}, "threshold 'auto': give a number from -1 to 1$"),
        ("graph", {"attention": "prop"}, "proportional"),
        ("graph", {"batch": "even"}, "ragged"),
        ("graph", {"r": 8}, "takes no r.*threshold"),
        ("graph", {"backend": "cuda"}, "opencv"),
        ("graph", {"layers": [True]}, r"layers \[True\].*integer"),
        ("algm", {"layers": [1, 2], "window": (5, 5)}, "larger than the grid"),
        ("algm", {"layers": [1, 2], "window": (1, 1)}, "at least two"),
        ("algm", {"layers": [1, 2], "window": 2}, "window 2: give 2 values"),
        ("algm", {"layers": [1, 2], "gbm_threshold": "auto"}, "adaptive or tau"),
        ("algm", {"layers": [1, 2], "gbm_threshold": 1.5}, "-1 to 1"),
        ("algm", {"layers": [2, 2]}, "ascending"),
        ("algm", {}, "by default.*1 to 3.*other layers"),
        ("mpm", {}, "by default.*1 to 3.*other layers"),
        ("tome", {"r": -1}, "from 0"),
        ("tome", {"r": [1, 2]}, "3 layers"),
        ("tome", {"r": [1, 2, 3], "r_inflection": 0.5}, "inflection"),
        ("tome", {"r": (4, 2.0)}, "inflection"),
        ("tome", {"r": (4, "a")}, "inflection"),
        ("tofu", {"variant": "pruned"}, "code or paper"),
        ("dct", {"layers": [4]}, "0 to 3"),
        ("dtem", {}, "add_modules"),
    ]
    for method, options, allowed in refused:
        with pytest.raises(ValueError, match=allowed) as caught:
            patch.apply(model, method, **options)
        assert "\n" not in str(caught.value)
        assert not patch.is_patched(model) and type(model.encoder.blocks[0]).__name__ == "Block"


def test_a_part_of_a_patched_model_is_patched(model):
    """Whichever comes first, the model or the ViT in it; either can be taken out again, compiled or not."""
    kinds = [type(module) for module in model.modules()]
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.eval()(images)
        for first, second in ((model, model.encoder), (model.encoder, model)):
            for compiled in (False, True):
                patch.apply(first, "graph", threshold=0.2)
                if compiled and first is model:
                    patch.compile(model, backend="eager")
                with pytest.raises(ValueError, match="patched with graph already"):
                    patch.apply(second, "tome")
                patch.remove(second)
                assert not patch.is_patched(model.encoder)
                torch.testing.assert_close(model(images), expected)
                patch.remove(first)
                assert kinds == [type(module) for module in model.modules()]
                assert torch.equal(model(images), expected)


def test_layers_may_be_a_range(model):
    patch.apply(model, "tome", layers=range(1, 4), r=2)
    assert patch.options(model)["layers"] == (1, 2, 3)


def test_patching_twice_and_asking_the_unpatched_are_refused(model):
    for ask in (patch.reduction, patch.options, patch.method, lambda model: patch.set_threshold(model, 0.5)):
        with pytest.raises(ValueError, match=r"patch\.apply"):
            ask(model)
    patch.apply(model, "graph")
    for part in (model, model.encoder):
        with pytest.raises(ValueError, match=r"patch\.remove"):
            patch.apply(part, "graph")


def test_unknown_blocks_are_refused(small_net):
    for part in ("encoder", "decoder"):
        model = create_segmenter(small_net)
        block = getattr(model, part).blocks[0]
        block.__class__ = type("Strange", (type(block),), {"forward": lambda self, x: x})
        with pytest.raises(ValueError, match="Strange"):
            patch.apply(model, "graph")
        assert not patch.is_patched(model)


@torch.inference_mode()
def test_algm_alone_in_every_layer_and_with_a_fixed_threshold(model):
    images = torch.randn(2, 3, 32, 32)
    for options in ({"window": (0, 0), "layers": [1, 2, 3]}, {"layers": [1, 2, 3], "gbm_threshold": "tau"}):
        patch.apply(model, "algm", threshold=-1.0, **options)
        assert model(images).shape == (2, 5, 32, 32)
        if "gbm_threshold" in options:  # 16 patches: four windows, then all that may merge: 2, then 1
            assert [step.lengths for step in patch.reductions(model).values()] == [(4, 4), (2, 2), (1, 1)]
        patch.remove(model)


@torch.inference_mode()
def test_algm_is_uniform_in_training_and_ragged_at_inference(small_net):
    model, images = create(small_net, "algm"), different_images()
    model.train()(images)
    assert len(set(patch.reduction(model).lengths)) == 1
    model.eval()(images)
    assert len(set(patch.reduction(model).lengths)) > 1


def test_schedules_of_tome():
    from patch.methods.common import scheduled_r

    for r, inflection, removed in (
        (4, None, [4, 4, 4]),
        ([1, 0, 3], None, [1, 0, 3]),
        (4, 1.0, [0, 4, 8]),
        (4, -0.5, [6, 4, 2]),
    ):
        assert [scheduled_r(r, inflection, layer, 3) for layer in (1, 2, 3)] == removed
    assert scheduled_r(4, 0.5, 1, 1) == 2  # of one layer
    found = patch.check("tome", 3, (4, 4), r=(4, 0.5))
    assert (found["r"], found["r_inflection"]) == (4, 0.5)


@torch.inference_mode()
def test_fixed_numbers_never_remove_more_than_half(small_net):
    for method in ("tome", "tofu", "dct", "dtem"):
        model = create(small_net, method, r=100)
        model(torch.randn(1, 3, 32, 32))
        assert [step.lengths for step in patch.reductions(model).values()] == [(8,), (4,), (2,)], method


@torch.inference_mode()
def test_dct_before_the_first_block(small_net):
    model = create(small_net, "dct", layers=[0, 2], r=[3, 0, 5])
    with pytest.raises(ValueError, match="0 to 3"):
        patch.check("dct", 3, (4, 4), layers=[4])
    with patch.replaced_merge(model, lambda step: g2tm.dct(step.x, r=step.layer + 1)):
        model(torch.randn(2, 3, 32, 32))
    assert {layer: step.lengths for layer, step in patch.reductions(model).items()} == {0: (15, 15), 2: (12, 12)}


@torch.inference_mode()
def test_another_function_may_stand_for_the_merge(model):
    """To record merges, and to replay them."""
    patch.apply(model, "graph", threshold=0.2)
    images, own, record = torch.randn(2, 3, 32, 32), patch.find("graph").merge, []
    expected = model(images)
    with patch.replaced_merge(model, lambda step: record.append(own(step)) or record[-1]):
        model(images)
    assert len(record) == 1
    with patch.replaced_merge(model, lambda step: record[0]):
        assert torch.equal(model(images), expected)
        assert patch.reduction(model) is record[0] and patch.method(model) == "graph"
    with pytest.raises(KeyError), patch.replaced_merge(model, lambda step: {}["none"]):
        model(images)
    assert torch.equal(model(images), expected) and len(record) == 1


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
