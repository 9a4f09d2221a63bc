"""Looking at the tokens of a model."""

import itertools

import networkx
import pytest
import torch

import g2tm
import patch
from segm.model.factory import create_segmenter
from tests.families import FAMILIES
from tests.helpers import different_images


def components(right, down):
    """Component of every patch, numbered by first patch, from the edges that survive: (gh, gw-1) and (gh-1, gw)."""
    gh, gw = len(right), down.shape[1]
    graph = networkx.Graph()
    graph.add_nodes_from(range(gh * gw))
    graph.add_edges_from((r * gw + c, r * gw + c + 1) for r, c in right.nonzero().tolist())
    graph.add_edges_from((r * gw + c, (r + 1) * gw + c) for r, c in down.nonzero().tolist())
    assignment = torch.empty(gh * gw, dtype=torch.long)
    for index, members in enumerate(sorted(networkx.connected_components(graph), key=min)):
        assignment[list(members)] = index
    return assignment


def test_edges_tell_what_graph_would_merge(golden_model):
    """The grid is that of the images at hand, padding included."""
    for size, threshold in itertools.product([(192, 192), (150, 100)], [0.1, 0.2, 0.35]):
        images = torch.randn(2, 3, *size)
        gh, gw = (-(-side // 16) for side in size)
        with torch.inference_mode(), patch.edges(golden_model.encoder, 2) as found:
            assert found == {}
            golden_model.grid_logits(images)
        assert found["right"].shape == (2, gh, gw - 1) and found["down"].shape == (2, gh - 1, gw)
        assert found["right"].dtype == torch.float32
        with torch.inference_mode():
            patch.apply(golden_model, "graph", layers=[2], threshold=threshold).grid_logits(images)
        for image, assignment in enumerate(patch.reduction(golden_model).assignment):
            expected = components(found["right"][image] > threshold, found["down"][image] > threshold)
            assert torch.equal(assignment, expected)
        patch.remove(golden_model)


def test_edges_follow_the_last_pass_and_leave_nothing_behind(golden_model):
    with torch.inference_mode(), patch.edges(golden_model.encoder, 1) as found:
        golden_model.grid_logits(torch.randn(1, 3, 64, 64))
        golden_model.grid_logits(torch.randn(3, 3, 48, 80))
    assert found["right"].shape == (3, 3, 4) and found["down"].shape == (3, 2, 5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in golden_model.modules())


@torch.inference_mode()
def test_tokens_are_those_between_attention_and_mlp(golden_model):
    seen, images = {}, torch.randn(2, 3, 96, 64)
    handles = [
        golden_model.encoder.blocks[layer - 1].norm2.register_forward_pre_hook(
            lambda module, inputs, layer=layer: seen.update({layer: inputs[0][:, 1:]})
        )
        for layer in (1, 4)
    ]
    with patch.tokens(golden_model.encoder, [1, 4]) as found:
        golden_model.grid_logits(images)
    assert [*found] == [1, 4] and found[1].shape == (2, 24, 128)
    for layer, tokens in found.items():
        torch.testing.assert_close(tokens, seen[layer])
    for handle in handles:
        handle.remove()
    assert not patch.is_patched(golden_model)


def test_edges_refuse_what_they_cannot_show(golden_model):
    for layer in (0, 7):
        with pytest.raises(ValueError, match="layers 1 to 6"), patch.edges(golden_model.encoder, layer):
            pass
    patch.apply(golden_model, "graph")
    for look in (lambda: patch.edges(golden_model.encoder, 2), lambda: patch.similarities(golden_model.encoder, [2])):
        with pytest.raises(ValueError, match=r"patch\.remove"), look():
            pass


@torch.inference_mode()
def test_reductions_are_the_steps_of_the_last_pass(small_net):
    model = create_segmenter(small_net).eval()
    assert patch.reductions(model) == {}
    patch.apply(model, "tome", r=2)
    assert patch.reductions(model) == {} and patch.reduction(model) is None
    model(torch.randn(2, 3, 32, 32))
    steps = patch.reductions(model)
    assert {layer: step.lengths for layer, step in steps.items()} == {1: (14, 14), 2: (12, 12), 3: (10, 10)}
    assert all(step.assignment.shape == (2, 16) for step in steps.values())
    assert patch.reduction(model) is steps[3] is patch.reduction(model.encoder)
    steps.clear()
    assert len(patch.reductions(model)) == 3


@torch.inference_mode()
def test_merges_are_seen_by_a_profiler(small_net):
    model = create_segmenter(small_net).eval()
    for method, n_ranges in ((None, 0), ("graph", 2), ("tome", 4)):  # every merge, and the undoing
        if method is not None:
            patch.apply(patch.remove(model), method, **{"graph": {"threshold": 0.2}, "tome": {"r": 2}}[method])
        with torch.profiler.profile() as profile, patch.merge_ranges(model, "merging"):
            model(torch.randn(1, 3, 32, 32))
        assert sum(event.name == "merging" for event in profile.events()) == n_ranges


PLAIN = [name for name in FAMILIES if name not in ("segmenter", "mask transformer")]


def after_attention(family, model, images, layer):
    """(B, N, D), the patch tokens where a layer would merge them: what a method is handed that merges nothing."""
    found = []

    def keep(step):
        found.append(step.x.clone())
        return patch.find("graph").merge(step)

    patch.apply(model, "graph", layers=[layer], threshold=1.0)
    with patch.replaced_merge(model, keep):
        family.run(model, images)
    patch.remove(model)
    return found[0]


@torch.inference_mode()
@pytest.mark.parametrize("name", PLAIN)
def test_edges_and_similarities_of_every_family(name):
    family, images = FAMILIES[name], different_images(3)
    model, plain = family.build(), family.run(family.build(), images)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for layer in (1, 3):
        tokens = after_attention(family, model, images, layer)
        right, down = g2tm.edge_similarities(tokens, (4, 4))
        moments = g2tm.statistics.similarity_moments(tokens)
        with patch.edges(model, layer) as found, patch.similarities(model, [layer]) as sums:
            assert found == {} and sums == {}
            torch.testing.assert_close(family.run(model, images), plain)
        assert found["right"].shape == (3, 4, 3) and found["down"].shape == (3, 3, 4)
        torch.testing.assert_close(found["right"], right, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["down"], down, atol=1e-5, rtol=1e-5)
        assert list(sums) == [layer]
        torch.testing.assert_close(sums[layer], moments, atol=1e-4, rtol=1e-4)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    with pytest.raises(ValueError, match="layers 1 to 3"), patch.edges(model, 4):
        pass
    patch.apply(model, "graph")
    with pytest.raises(ValueError, match=r"patch\.remove"), patch.edges(model, 1):
        pass


@torch.inference_mode()
@pytest.mark.parametrize("name", ["Dinov2", "ViT", "SiglipVision", "mmseg"])
def test_what_edges_tell_is_what_graph_merges(name):
    family, images = FAMILIES[name], different_images(3)
    for threshold in (0.1, 0.3, 0.6):
        model = family.build()
        with patch.edges(model, 2) as found:
            family.run(model, images)
        patch.apply(model, "graph", layers=[2], threshold=threshold)
        family.run(model, images)
        for image, assignment in enumerate(patch.reduction(model).assignment):
            expected = components(found["right"][image] > threshold, found["down"][image] > threshold)
            assert torch.equal(assignment, expected)


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_reductions_and_ranges_of_every_family(name):
    family, images = FAMILIES[name], different_images(2)
    model = family.patched("tome")
    with torch.profiler.profile() as profile, patch.merge_ranges(model, "merging"):
        family.run(model, images)
    assert sum(event.name == "merging" for event in profile.events()) >= 4  # three merges, and an undoing
    assert {layer: step.lengths for layer, step in patch.reductions(model).items()} == {
        1: (14, 14),
        2: (12, 12),
        3: (10, 10),
    }


@torch.inference_mode()
@pytest.mark.parametrize("name", ["segmenter", "mask transformer"])
def test_a_model_that_holds_a_vit_is_looked_at_too(name):
    """As `apply` finds it, wrapped or not."""
    family, images = FAMILIES[name], different_images(2)
    model = family.build()
    with patch.edges(model.encoder, 2) as expected, patch.similarities(model.encoder, [2]) as moments:
        family.run(model, images)
    for whole in (model, torch.nn.DataParallel(model)):
        with patch.edges(whole, 2) as found, patch.similarities(whole, [2]) as sums:
            whole(images)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(sums, moments)
