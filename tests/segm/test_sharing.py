"""Runs that are passed on: written, loaded again, and found under a name."""

import json

import huggingface_hub
import pytest
import safetensors
import torch
import yaml

from segm import test
from segm.checkpoint import BEST, LAST, SHARED, load_checkpoint, save_checkpoint, weights_digest
from segm.config import TUNED
from segm.eval import miou
from segm.report import open_runs
from segm.run import Run
from tests.helpers import read_variant, write_variant

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
    assert "11 classes" in text and "Not scored with this setting" in text and "threshold 0.3" in text
    assert "Weights: `checkpoint.pth`, the last of the training, after epoch 1." in text
    run.save_pretrained(folder, {"mean_iou": 12.5})
    assert "| mIoU | 12.50 |" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match="sizes of its training"):
        Run.load(shapes_run, device="cpu", im_size=24).save_pretrained(folder, {"mean_iou": 12.5})


@pytest.fixture
def trained(shapes_run):
    """A run directory whose best epoch was not its last."""
    checkpoint = load_checkpoint(shapes_run)
    best = {name: value + 0.01 for name, value in checkpoint["model"].items()}
    save_checkpoint(checkpoint | {"model": best, "epoch": 1}, shapes_run / BEST)
    save_checkpoint(checkpoint | {"epoch": 2}, shapes_run / LAST)
    entries = [{"epoch": epoch, "threshold": None, "val_mean_iou": 40.0 + epoch * (3 - epoch)} for epoch in range(3)]
    entries += [entries[2] | {"val_mean_iou": 41.5}]  # resumed: an epoch that was done again
    (shapes_run / "log.txt").write_text("\n".join(map(json.dumps, entries)))
    return shapes_run


def share(run, folder):
    """The card of a run that is shared, and where its weights say that they come from."""
    run.save_pretrained(folder)
    with safetensors.safe_open(folder / SHARED, "pt") as file:
        return (folder / "README.md").read_text(), {k: v for k, v in file.metadata().items() if k != "format"}


def test_scores_of_the_card_are_those_of_its_weights(trained, tmp_path):
    for which, file, epoch, score in (("last", LAST, 2, 41.5), ("best", BEST, 1, 42.0)):
        run = Run.load(trained, device="cpu", checkpoint=which)
        text, origin = share(run, tmp_path / which)
        assert f"| mIoU | {score:.2f} |" in text and f"`{file}`" in text and f"after epoch {epoch + 1}" in text
        assert origin == {"checkpoint": file, "epoch": str(epoch)}
        again = Run.load(tmp_path / which, device="cpu").model.state_dict()
        assert all(torch.equal(again[name], value) for name, value in run.model.state_dict().items())


def test_scores_with_other_merging_or_of_other_weights_are_left_out(trained, tmp_path):
    def is_scored(**options):
        return "| mIoU |" in share(Run.load(trained, device="cpu", **options), tmp_path / "shared")[0]

    assert is_scored() and not is_scored(patch_type="graph", threshold=0.3)
    variant = read_variant(trained)
    variant["dataset_kwargs"] |= {"patch_type": "graph", "threshold": 0.3, "selected_layer": 1}
    write_variant(variant, trained)
    assert not is_scored()  # the log is of another threshold, as on the way of a curriculum
    log = trained / "log.txt"
    log.write_text(log.read_text().replace("null", "0.3"))
    assert is_scored() and not is_scored(threshold=0.4) and not is_scored(patch_type="pure")
    changed = Run.load(trained, device="cpu")
    changed.model.decoder.cls_emb.data += 1
    text, origin = share(changed, tmp_path / "changed")
    assert "Not scored" in text and "of no checkpoint" in text and not origin
    checkpoint = load_checkpoint(trained)
    save_checkpoint(checkpoint | {"updates": 7}, trained / LAST)  # in the middle of the next epoch
    assert not is_scored() and is_scored(checkpoint="best")


def test_presets_of_other_weights_are_not_passed_on(trained, tmp_path):
    one = {"merging": {"patch_type": "pure"}, "im_size": 32, "precision": "float32"}
    one |= {"mean_iou": 1.0, "boundary_iou": 2.0, "ms": 3.0}
    content = {"dataset": "shapes", "device": "cpu", "plain": one, "presets": {"equal": one}}
    content["weights"] = weights_digest(load_checkpoint(trained)["model"])
    (trained / TUNED).write_text(yaml.safe_dump(content))
    for which in ("last", "best"):
        text, _ = share(Run.load(trained, device="cpu", checkpoint=which), tmp_path / which)
        assert ("equal" in text) == (tmp_path / which / TUNED).exists() == (which == "last")


def test_commands_take_one_checkpoint_of_a_run(trained, tmp_path, call, refused):
    few = ["--max-images", 2, *CPU]
    found = [call(test, trained, *few, *which) for which in ([], ["--checkpoint", "last"], ["--checkpoint", "best"])]
    assert found[0] == found[1] == call(test, trained / LAST, *few) and found[2] == call(test, trained / BEST, *few)
    assert found[0] != found[2]
    assert "confusion_ss.png" in call(miou, trained, "shapes", "--checkpoint", "best", "--confusion", *few)
    assert (trained / "confusion_ss.png").stat().st_size
    (entry,) = yaml.safe_load((trained / "scores_ss.yml").read_text())
    assert entry["conditions"]["checkpoint"] == BEST
    assert open_runs([f"a={trained}", f"b={trained} --checkpoint best"], None, torch.device("cpu"))[1].path.name == BEST
    share(Run.load(trained, device="cpu"), tmp_path / "shared")
    assert f"holds {SHARED}" in refused(test, tmp_path / "shared", "--checkpoint", "best", *few)
    assert "is one checkpoint" in refused(test, trained / LAST, "--checkpoint", "best", *few)
    with pytest.raises(ValueError, match="choose one of last, best"):
        Run.load(trained, checkpoint="first")


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
