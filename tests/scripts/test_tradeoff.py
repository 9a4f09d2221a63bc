"""A run in other settings."""

import importlib
import sys
from pathlib import Path

import pytest

from segm.run import Run

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def setting(monkeypatch):
    """The class of settings."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("tradeoff").Setting
    sys.modules.pop("tradeoff", None)


def test_variations_share_their_weights_and_nothing_else(shapes_run, setting):
    run = Run.load(shapes_run, device="cpu", patch_type="graph", layers=[1], threshold=0.5)
    pure, other = run.with_settings("pure", {}), setting("tome", {"r": 2}, 16).apply_to(run)
    assert (run.method, pure.method, other.method) == ("graph", "pure", "tome")
    assert other.image_size == run.image_size and other.crop_size == (16, 16) and run.crop_size == (32, 32)
    for one in (pure, other):
        pairs = zip(run.model.parameters(), one.model.parameters(), strict=True)
        assert all(a is b for a, b in pairs)
    assert setting("tome", {"r": 2}).key == setting("tome", {"r": 2}).key != setting("tome", {"r": 3}).key
    with pytest.raises(ValueError, match="choose"):
        run.with_settings("nothing", {})
