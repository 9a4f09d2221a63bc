"""The comparison of methods in one run."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests/data"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import compare

    yield compare
    del sys.modules["compare"]


def test_a_method_is_a_run_with_merging_options(compare):
    name, run, given = compare.read_method("a=runs/x --patch-type algm --selected-layers 1 3 --threshold 0.9")
    assert (name, run) == ("a", Path("runs/x"))
    assert (given["patch_type"], given["selected_layers"], given["threshold"]) == ("algm", (1, 3), 0.9)


def test_all_methods_are_measured_on_the_same_images(compare, tmp_path, monkeypatch):
    """On the released-format checkpoint, with the published token count of ToMe: 6 layers, 6 tokens each."""
    monkeypatch.setattr(compare, "evaluate", lambda model, dataset, windows, **rest: compare.torch.eye(11))
    methods = [f"pure={DATA}", f"tome={DATA} --patch-type tome --r 6"]
    out = tmp_path / "rows.json"
    result = CliRunner().invoke(compare.main, ["shapes", *methods, "--cost-images", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    pure, tome = json.loads(out.read_text())["rows"]
    assert (pure["tokens"], tome["tokens"]) == (144, 108)
    assert 0 < tome["gflops"] < pure["gflops"] and pure["images_per_second"] > 0
    assert pure["mean_iou"] == 100 and "| tome | 108.0 |" in result.output
    refused = CliRunner().invoke(compare.main, ["shapes", "pure"])
    assert refused.exit_code != 0 and "NAME=RUN" in refused.output
