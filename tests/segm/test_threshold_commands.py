"""Automatic thresholds; tuned ones: test_tune.py."""

import pytest
import torch

from segm import auto_threshold
from segm.data import create_dataset
from segm.data.images import resized_view
from segm.model.factory import load_model

SIZE = 32
CPU = ["--device", "cpu"]


@pytest.fixture
def run(shapes_run, monkeypatch):
    """What is tuned is timed on all images, of which there are few."""
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 6, "val": 2})
    return shapes_run


def test_automatic_thresholds_are_mean_plus_std_over_all_pairs(run):
    """Against all pairs of three images spread over the data, collected and then averaged."""
    found = auto_threshold.automatic_thresholds(run, "shapes", [1, 3], torch.device("cpu"), max_images=3)
    model, dataset = load_model(run)[0], create_dataset("shapes", "train")
    seen = []
    handle = model.encoder.blocks[2].norm2.register_forward_pre_hook(lambda m, i: seen.append(i[0][0, 1:]))
    with torch.inference_mode():
        for index in (0, len(dataset) // 3, 2 * len(dataset) // 3):
            model(resized_view(dataset[index].image, SIZE, "vit"))
    handle.remove()
    i, j = torch.triu_indices(16, 16, 1)
    units = [torch.nn.functional.normalize(tokens.double(), dim=-1) for tokens in seen]
    cosines = torch.cat([(unit @ unit.T)[i, j] for unit in units])
    assert set(found) == {1, 3}
    assert found[3].mean == pytest.approx(cosines.mean().item(), abs=1e-9)
    assert found[3].std == pytest.approx(cosines.std(correction=0).item(), abs=1e-9)
    assert found[3].threshold == pytest.approx(min(1, found[3].mean + found[3].std))


def test_auto_threshold_prints_a_line_per_layer(run, call, refused):
    lines = call(auto_threshold, run, "shapes", "--selected-layers", 1, 2, "--max-images", 2, *CPU).splitlines()
    assert [line.split()[0] for line in lines] == ["layer", "1", "2"]
    assert "1 to 3" in refused(auto_threshold, run, "shapes", "--selected-layers", 4, *CPU)
    assert "ascending" in refused(auto_threshold, run, "shapes", "--selected-layers", 2, 1, *CPU)
