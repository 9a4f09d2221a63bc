"""The comparison of runs on one page."""

import base64
import json
import re
from html import escape, unescape

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from segm import report
from segm.checkpoint import save_checkpoint
from segm.model.factory import create_segmenter
from segm.run import Run
from tests.helpers import read_variant, write_variant

SIZE = 32
PURE = {"patch_type": "pure"}
GRAPH = {"patch_type": "graph", "selected_layer": 2, "threshold": 0.6}


def write_run(folder, net, **data):
    """A run directory on `shapes`, with random weights that are always the same."""
    torch.manual_seed(0)
    folder.mkdir(parents=True)
    net = net | {"n_cls": 11, "normalization": "vit"}
    save_checkpoint({"model": create_segmenter(net).state_dict(), "epoch": 0}, folder / "checkpoint.pth")
    data = {"dataset": "shapes", "image_size": SIZE, "crop_size": SIZE} | data
    inference = {"im_size": SIZE, "window_size": SIZE, "window_stride": SIZE}
    write_variant({"net_kwargs": net, "dataset_kwargs": data, "inference_kwargs": inference}, folder)
    return folder


@pytest.fixture
def pure(tmp_path, small_net):
    folder = write_run(tmp_path / "runs/pure", small_net, **PURE)
    (folder / "log.txt").write_text('{"epoch": 0, "train_loss": 1.5}\n{"epoch": 1, "train_loss": 1.0}\n')
    return folder


@pytest.fixture
def graph(tmp_path, small_net):
    return write_run(tmp_path / "runs/graph", small_net, **GRAPH)


SMALL = ["--cost-images", "2", "--max-images", "2", "--pictures", "1", "--explore", "2", "--device", "cpu"]


def call(tmp_path, *runs, options=()):
    """(what is printed, page, content of the JSON)."""
    out = tmp_path / "out/page.html"
    arguments = [*map(str, runs), *SMALL, "--out", str(out), *options]
    result = CliRunner().invoke(report.main, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout, out.read_text(), json.loads(out.with_suffix(".json").read_text())


def refused(tmp_path, *arguments):
    """The error message, one line; nothing was written."""
    before = sorted(tmp_path.rglob("*"))
    arguments = [*map(str, arguments), *SMALL]
    if "--out" not in arguments:
        arguments += ["--out", str(tmp_path / "out/page.html")]
    result = CliRunner().invoke(report.main, arguments)
    assert result.exit_code != 0 and isinstance(result.exception, SystemExit), result.output
    assert sorted(tmp_path.rglob("*")) == before
    text = result.stderr[result.stderr.index("Error: ") :].strip()
    assert "\n" not in text and "Traceback" not in result.output
    return text


def test_a_run_is_a_path_or_a_name_with_a_path_and_options(pure):
    assert report.read_run(str(pure)) == (None, pure, {})
    assert report.read_run(str(pure / "checkpoint.pth")) == (None, pure / "checkpoint.pth", {})
    name, path, given = report.read_run("a=runs/x y --patch-type algm".replace("x y", "'x y'"))
    assert (name, str(path), given["patch_type"]) == ("a", "runs/x y", "algm")
    _, _, given = report.read_run("a=runs/x --selected-layers 1 3 --threshold 0.9")
    assert given == {"layers": [1, 3], "threshold": 0.9}
    for size in ("--im-size 48", "--im-size=48"):
        assert report.read_run(f"a=runs/x --threshold 0.9 {size}")[2] == {"threshold": 0.9, "im_size": 48}


def test_every_run_is_measured_and_shown(tmp_path, pure, graph):
    tome = f"tome <b>={pure} --patch-type tome --r 2"
    printed, text, content = call(tmp_path, pure, graph, tome)
    rows = {row["name"]: row for row in content["rows"]}
    assert list(rows) == ["pure", "graph", "tome <b>"]
    assert (rows["pure"]["tokens"], rows["tome <b>"]["tokens"]) == (16, 10)  # 3 layers, 2 tokens each
    assert rows["graph"]["tokens"] < 16 and rows["graph"]["gflops"] < rows["pure"]["gflops"]
    for name, row in rows.items():
        assert row["images_per_second"] > 0 and 0 <= row["mean_iou"] <= 100 and len(row["per_class_iou"]) == 11
        assert row["gflops"] >= row["gflops_encoder"] + row["gflops_decoder"] and row["reference"] == "pure"
        assert f'<th scope="row">{escape(name)}</th><td>{row["mean_iou"]:.2f}</td>' in text
        assert f"| {name} | {row['mean_iou']:.2f} |" in printed
    assert rows["pure"]["speedup"] == rows["pure"]["realized_share"] == 1 and rows["graph"]["realized_share"] > 0
    assert "tome <b>" not in text and rows["graph"]["settings"]["threshold"] == 0.6
    assert content["dataset"] == "shapes" and content["n_images"] == {"mean_iou": 2, "cost": 2}
    assert content["torch"] == torch.__version__ and content["command"].startswith("g2tm report ")
    assert content["command"] in unescape(text) and "Training curves of pure" in text
    assert "val_00000" in text and "graph: prediction" in text


def test_the_explorer_counts_as_the_model_merges(tmp_path, pure, graph):
    """The similarities on the page, at the threshold of the run, give the tokens that were measured."""
    _, text, content = call(tmp_path, pure, graph)
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', text, re.DOTALL)[1])
    assert data["threshold"] == 0.6 and "layer 2 of graph" in text
    counts = []
    for image in data["images"]:
        assert (image["rows"], image["columns"], image["patch"]) == (4, 4, [8, 8])
        right, down = (np.frombuffer(base64.b64decode(image[key]), "<f4") for key in ("right", "down"))
        counts.append(_regions(right.reshape(4, 3), down.reshape(3, 4), 0.6))
    assert counts == content["rows"][1]["counts"]


def _regions(right, down, threshold):
    """Connected components of a 4 x 4 grid."""
    group = np.arange(16).reshape(4, 4)
    joined = [((r, c), (r, c + 1)) for r, c in np.argwhere(right > np.float32(threshold))]
    joined += [((r, c), (r + 1, c)) for r, c in np.argwhere(down > np.float32(threshold))]
    for first, second in joined:
        group[group == group[second]] = group[first]
    return len(np.unique(group))


@pytest.mark.slow
def test_the_layer_of_the_explorer_can_be_chosen(tmp_path, pure):
    assert "layer 2 of pure" in call(tmp_path, pure)[1]
    assert "layer 3 of pure" in call(tmp_path, pure, options=["--layer", "3"])[1]
    assert "Threshold explorer" not in call(tmp_path, pure, options=["--explore", "0"])[1]


def test_without_an_unpatched_run_a_copy_is_timed(tmp_path, graph):
    other = f"other={graph} --threshold 0.9"
    _, text, content = call(tmp_path, graph, other)
    assert [row["reference"] for row in content["rows"]] == ["graph, unpatched"] * 2
    assert [row["name"] for row in content["rows"]] == ["graph", "other"]
    assert "graph, unpatched" not in text


def test_curves_count_epochs_from_one_and_go_on_where_fine_tuning_begins(tmp_path, pure, small_net):
    tuned = write_run(tmp_path / "runs/tuned", small_net, **GRAPH)
    variant = read_variant(tuned)
    write_variant(variant | {"algorithm_kwargs": {"epochs_before": 2}}, tuned)
    (tuned / "log.txt").write_text('{"epoch": 0, "train_loss": 0.9}\n')
    logs = report.read_logs(report.open_runs([str(pure), str(tuned)], None, torch.device("cpu")))
    epochs = {name: [entry["epoch"] for entry in log] for name, log in logs.items()}
    assert epochs == {"pure": [1, 2], "tuned": [3]}


def test_pictures_keep_the_ratio_of_the_photograph(pure):
    run = Run.load(pure, device="cpu")
    dataset, _ = run.open()

    class Wide:
        classes, palette, n_cls = dataset.classes, dataset.palette, dataset.n_cls

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return type(dataset[0])("wide", np.zeros((32, 48, 3), np.uint8), None)

    blocks, _, _ = report.picture_blocks([run], Wide(), 1)
    assert {one.ratio for _, pairs in blocks for pair in pairs for one in pair} == {1.5}


def test_a_run_counts_against_its_own_architecture(tmp_path, pure, small_net):
    larger = write_run(tmp_path / "runs/larger", small_net | {"n_layers": 4}, **GRAPH)
    runs = report.open_runs([str(pure), str(larger), f"b={larger} --patch-type pure"], None, torch.device("cpu"))
    assert [report.reference_of(run, runs).name for run in runs] == ["pure", "b", "b"]


def test_runs_see_images_of_their_own_size_and_normalization(tmp_path, pure, small_net):
    larger = write_run(tmp_path / "runs/larger", small_net, **GRAPH | {"crop_size": 48, "image_size": 48})
    _, _, content = call(tmp_path, pure, larger)
    assert [row["n_patches"] for row in content["rows"]] == [16, 36]
    assert content["rows"][1]["reference"] == "larger, unpatched"


def test_tokens_that_are_no_groups_of_patches_are_shown_by_the_photograph(tmp_path, pure):
    _, text, content = call(tmp_path, pure, f"dct={pure} --patch-type dct --r 2")
    row = content["rows"][1]
    assert (row["method"], row["tokens"], row["counts"]) == ("dct", 10, [10, 10])  # 3 layers, 2 tokens each
    assert "dct: 10 of 16 tokens" in text and "dct, layers 1 2 3" in text


def test_classes_that_do_not_occur_are_null_in_the_json(tmp_path, pure, monkeypatch):
    confusion = torch.zeros(11, 11, dtype=torch.long)
    confusion[0, 0], confusion[1, 0] = 4, 4
    monkeypatch.setattr("segm.run.evaluate", lambda model, dataset, windows, **rest: confusion)
    _, text, content = call(tmp_path, pure)
    assert content["rows"][0]["mean_iou"] == 25.0 and content["rows"][0]["per_class_iou"] == [50.0, 0.0] + [None] * 9
    assert "nan" not in text.split("<svg")[0]


def test_images_without_labels(pure):
    run = Run.load(pure, device="cpu")
    dataset, _ = run.open()
    sample = dataset[0]

    class Unlabelled:
        classes, palette, n_cls = dataset.classes, dataset.palette, dataset.n_cls

        def __len__(self):
            return 1

        def __getitem__(self, index):
            return type(sample)(sample.name, sample.image, None)

    blocks, _, _ = report.picture_blocks([run], Unlabelled(), 1)
    ((name, pairs),) = blocks
    assert name == sample.name and [one.caption for one in pairs[0]] == ["input", "truth"]


def test_where_labels_differ_is_shown(pure, graph):
    """Of each run against the first; the share is that of the pixels."""
    runs = [Run.load(pure, device="cpu"), Run.load(pure, device="cpu", name="same"), Run.load(graph, device="cpu")]
    dataset, _ = runs[0].open()
    ((_, pairs),), _, _ = report.picture_blocks(runs, dataset, 1)
    captions = [upper.caption for upper, _ in pairs[4:]]
    assert captions[0] == "same: other labels than pure in 0.0 % of the pixels"
    maps = [run.model.predict(run.preprocess_resized(dataset[0].image))[0] for run in runs]
    share = 100 * (maps[0] != maps[2]).double().mean().item()
    assert share > 0 and captions[1:] == [f"graph: other labels than pure in {share:.1f} % of the pixels"]


class TestRefused:
    def test_runs(self, tmp_path, pure):
        assert "two runs are named pure" in refused(tmp_path, pure, f"pure={pure}")
        assert "NAME=PATH" in refused(tmp_path, "nowhere")
        assert "nowhere" in refused(tmp_path, "a=nowhere")
        assert "NAME=PATH" in refused(tmp_path, f"={pure}")
        assert "NAME=PATH" in refused(tmp_path, "a=")
        assert "--nosuch" in refused(tmp_path, f"a={pure} --nosuch")
        assert "graph" in refused(tmp_path, f"a={pure} --patch-type nosuch")
        assert refused(tmp_path, f"a={pure} --patch-type graph --selected-layer 9").startswith("Error: a: ")
        (tmp_path / "empty").mkdir()
        assert "no checkpoint" in refused(tmp_path, tmp_path / "empty")

    def test_the_rest(self, tmp_path, pure):
        assert "layers 1 to 3" in refused(tmp_path, pure, "--layer", "4")
        assert ".html" in refused(tmp_path, pure, "--out", tmp_path / "page.json")
        (tmp_path / "file").write_text("")
        assert "written" in refused(tmp_path, pure, "--out", tmp_path / "file/page.html")

    def test_another_number_of_classes(self, tmp_path, pure, small_net):
        other = write_run(tmp_path / "runs/other", small_net, **PURE)
        net = small_net | {"normalization": "vit"}
        save_checkpoint({"model": create_segmenter(net).state_dict(), "epoch": 0}, other / "checkpoint.pth")
        data = {"dataset": "shapes", "image_size": SIZE, "crop_size": SIZE}
        write_variant({"net_kwargs": net, "dataset_kwargs": data}, other)
        assert "classes" in refused(tmp_path, pure, other)
