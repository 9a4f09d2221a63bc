"""What several test files share."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

DATA = Path(__file__).parent / "data"

# The models of most tests are so small that threads only wait for each other, above all on a busy machine.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cases():
    """Conformance vectors by name, in float32 where they are floating point."""
    tensors = load_file(DATA / "cases.safetensors")
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


@pytest.fixture(scope="session")
def case_settings():
    """Parameters and token counts of every patched case."""
    return json.loads((DATA / "cases.json").read_text())


@pytest.fixture
def golden_model():
    """The small Segmenter of the conformance vectors."""
    from segm.model.factory import load_model

    return load_model(DATA)[0]


@pytest.fixture(autouse=True)
def seed():
    """Random tensors of a test are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture
def small_net():
    """Settings of a Segmenter that runs in milliseconds."""
    return {
        "backbone": "vit_tiny_patch16_384",
        "image_size": [32, 32],
        "patch_size": 8,
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 3,
        "n_cls": 5,
        "decoder": {"name": "mask_transformer", "n_layers": 1, "dropout": 0.0},
    }
