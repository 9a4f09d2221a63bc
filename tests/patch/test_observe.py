"""Looking at the tokens of a model."""

import itertools

import networkx
import pytest
import torch

import patch
from segm.model.factory import create_segmenter


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
