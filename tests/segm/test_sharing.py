"""Runs that are passed on: written, loaded again, and found under a name."""

import json

import huggingface_hub
import pytest
import torch
import yaml

from segm import test
from segm.checkpoint import SHARED
from segm.run import Run

CPU = ["--device", "cpu"]


@pytest.fixture
def shared(shapes_run, tmp_path):
    run = Run.load(shapes_run, device="cpu", patch_type="graph", threshold=0.3, layers=[1])
    run.save_pretrained(tmp_path / "shared")
    return run, tmp_path / "shared"


def test_a_shared_run_is_the_same_run(shared, tmp_path, call):
    run, folder = shared
    again = Run.load(folder, device="cpu")
    assert (again.method, again.options) == (run.method, run.options)
    assert {file.name for file in folder.iterdir()} == {SHARED, "variant.yml", "README.md"}
    images = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(again.model(images), run.model(images))
    assert "mean_iou" in call(test, folder, "--max-images", 1, *CPU)
    Run.load(folder, device="cpu", patch_type="pure").save_pretrained(tmp_path / "pure")
    assert Run.load(tmp_path / "pure", device="cpu").method == "pure"
    Run.load(folder, device="cpu", tokens=5).save_pretrained(tmp_path / "budget")
    Run.load(tmp_path / "budget", device="cpu", patch_type="algm", layers=[1, 2]).save_pretrained(tmp_path / "algm")
    assert Run.load(tmp_path / "algm", device="cpu").options["tokens"] is None
    Run.load(folder, device="cpu", patch_type="tome", r=2).save_pretrained(tmp_path / "tome")
    assert Run.load(tmp_path / "tome", device="cpu").options["r"] == 2


def test_the_card_says_what_it_is(shared, shapes_run):
    run, folder = shared
    front, text = (folder / "README.md").read_text().removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["datasets"] == ["shapes"] and yaml.safe_load(front)["library_name"] == "g2tm"
    assert "11 classes" in text and "not measured" in text and "threshold 0.3" in text
    log = [{"epoch": 0, "val_mean_iou": 41.0}, {"epoch": 1, "val_mean_iou": 43.21, "val_pixel_accuracy": 90.0}]
    (shapes_run / "log.txt").write_text("\n".join(map(json.dumps, log)))
    run.save_pretrained(folder)
    assert "| mIoU | 43.21 |" in (folder / "README.md").read_text()
    run.save_pretrained(folder, {"mean_iou": 12.5})
    assert "| mIoU | 12.50 |" in (folder / "README.md").read_text()


def test_a_name_is_fetched_from_the_hub(shared, monkeypatch):
    _, folder = shared
    asked = []

    def fetch(name, **options):
        asked.append(name)
        if name != "someone/model":
            raise ConnectionError("no network\nat all")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert Run.load("someone/model", device="cpu").method == "graph"
    with pytest.raises(FileNotFoundError, match=r"no such run directory here.*no network at all"):
        Run.load("someone/other", device="cpu")
    assert asked == ["someone/model", "someone/other"]
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Run.load(folder.parent / "missing", device="cpu")
    assert len(asked) == 2


def test_a_damaged_file_is_named(shared):
    _, folder = shared
    (folder / SHARED).write_bytes(b"no weights")
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        Run.load(folder, device="cpu")
