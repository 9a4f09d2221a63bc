"""Looking at the tokens of a model."""

import pytest
import torch

import g2tm
import patch


@pytest.mark.parametrize("size", [(192, 192), (150, 100)])
@pytest.mark.parametrize("threshold", [0.1, 0.2, 0.35])
def test_edges_tell_what_graph_would_merge(golden_model, size, threshold):
    """The grid is that of the images at hand, padding included."""
    images = torch.randn(2, 3, *size)
    gh, gw = (-(-side // 16) for side in size)
    with torch.inference_mode(), patch.edges(golden_model.encoder, 2) as found:
        assert found == {}
        golden_model.grid_scores(images)
    assert found["right"].shape == (2, gh, gw - 1) and found["down"].shape == (2, gh - 1, gw)
    assert found["right"].dtype == torch.float32
    with torch.inference_mode():
        patch.segmenter(golden_model, "graph", layers=[2], threshold=threshold).grid_scores(images)
    index = torch.arange(gh * gw).view(gh, gw)
    for image in range(2):
        right, down = found["right"][image] > threshold, found["down"][image] > threshold
        start = torch.cat([index[:, :-1][right], index[:-1][down]])
        end = torch.cat([index[:, 1:][right], index[1:][down]])
        roots = g2tm.components.component_roots(start, end, gh * gw)
        assert torch.equal(patch.reduction(golden_model).assignment[image], roots.unique(return_inverse=True)[1])


def test_edges_follow_the_last_pass_and_leave_nothing_behind(golden_model):
    with torch.inference_mode(), patch.edges(golden_model.encoder, 1) as found:
        golden_model.grid_scores(torch.randn(1, 3, 64, 64))
        golden_model.grid_scores(torch.randn(3, 3, 48, 80))
    assert found["right"].shape == (3, 3, 4) and found["down"].shape == (3, 2, 5)
    modules = [golden_model.encoder.patch_embed, golden_model.encoder.blocks[0].norm2]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def test_edges_refuse_what_they_cannot_show(golden_model):
    for layer in (0, 7):
        with pytest.raises(ValueError, match="layers 1 to 6"), patch.edges(golden_model.encoder, layer):
            pass
    patch.segmenter(golden_model, "graph")
    with pytest.raises(ValueError, match=r"patch\.remove"), patch.edges(golden_model.encoder, 2):
        pass
