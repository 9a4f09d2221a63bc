"""The commands that measure: speed, operations, profile, tokens."""

import json
from dataclasses import replace
from functools import partial
from itertools import product

import pytest
import torch

import patch
from segm import flops, profile_model, speedtest, token_stats
from segm.config import Merging
from segm.merging import count_tokens
from segm.run import Run

OPTIONS = ["shapes", "--device", "cpu", "--max-images", "3"]
GRAPH = ["--patch-type", "graph", "--threshold", "0.5"]


class TestSpeed:
    def test_methods_are_compared_with_the_first(self, shapes_run, tmp_path, call):
        compare = "pure,graph --selected-layer 1 --threshold -1,algm --selected-layers 1 2,tome --r 2"
        options = ["--compare", compare, "--warmup", 1, "--repeats", 2, "--out", tmp_path / "speed.json"]
        printed = call(speedtest, shapes_run, *OPTIONS, *options, "--threshold", 0.5)
        saved = json.loads((tmp_path / "speed.json").read_text())
        rows = {row["method"].split()[0]: row for row in saved["rows"]}
        assert rows["pure"]["ratio"] == 1 and rows["pure"]["tokens"] == 16
        assert rows["graph"]["tokens"] == 1 and rows["tome"]["tokens"] == 10  # 3 layers, 2 tokens each
        assert all(row["q25"] <= row["images_per_second"] <= row["q75"] for row in saved["rows"])
        assert (saved["batches"], saved["batch_size"], saved["height"], saved["width"]) == (3, 1, 32, 32)
        assert "| pure | 16.0 |" in printed and "float32" in printed

    def test_half_precision_batches_of_one_image(self, shapes_run, call):
        options = ["--batch-size", 3, "--duplicate", "--warmup", 0, "--repeats", 1]
        for dtype, output in product(["bfloat16", "float16"], ["logits", "scores", "labels"]):
            printed = call(speedtest, shapes_run, *OPTIONS, *options, "--dtype", dtype, "--output", output, *GRAPH)
            assert f"3 x 3 images of 32 x 32, {output}" in printed and dtype in printed

    @pytest.mark.nightly
    def test_compiled_methods_are_compared(self, shapes_run, tmp_path, monkeypatch, call):
        monkeypatch.setattr(patch, "compile", partial(patch.compile, backend="eager"))
        compare = "pure,graph --threshold 0.5"
        options = ["--compare", compare, "--compile", "--warmup", 0, "--repeats", 1, "--out", tmp_path / "speed.json"]
        printed = call(speedtest, shapes_run, *OPTIONS, *options)
        torch._dynamo.reset()
        saved = json.loads((tmp_path / "speed.json").read_text())
        assert saved["compiled"] and len(saved["rows"]) == 2 and "logits, compiled" in printed

    def test_common_options_hold_where_they_are_known(self, shapes_run):
        run = Run.load(shapes_run, device="cpu")
        methods = speedtest.read_methods("pure,graph,tome --r 4", {"threshold": 0.5, "layers": 2}, run.resolve_merging)
        assert methods["pure"] == ("pure", {})
        assert methods["graph"] == ("graph", {"threshold": 0.5, "layers": 2})
        assert methods["tome --r 4"] == ("tome", {"r": 4, "layers": 2})

    def test_what_a_run_was_trained_with_is_compared(self, shapes_run):
        run = Run.load(shapes_run, device="cpu")
        trained = Merging("graph", {"selected_layer": 3, "threshold": 0.7})
        run = replace(run, config=replace(run.config, merging=trained))
        for compare in (None, "pure,graph"):
            options = speedtest.read_methods(compare, {}, run.resolve_merging)["graph"][1]
            assert (options["layers"], options["threshold"]) == (3, 0.7)

    def test_bad_comparisons_are_refused(self, shapes_run, refused):
        cases = {"pure,nosuch": "graph", "pure,pure": "twice", "pure,,graph": "graph", "graph --nosuch": "nosuch"}
        for compare, allowed in cases.items():
            message = refused(speedtest, shapes_run, *OPTIONS, "--compare", compare)
            assert allowed in message and "--compare" in message

    def test_options_that_no_method_takes_are_refused(self, shapes_run, refused):
        assert "r: none" in refused(speedtest, shapes_run, *OPTIONS, "--compare", "pure,graph", "--r", 5)
        assert "--patch-type" in refused(speedtest, shapes_run, *OPTIONS, "--compare", "pure", "--patch-type", "tome")
        assert "--selected-layers" in refused(speedtest, shapes_run, *OPTIONS, "--compare", "pure,algm")

    def test_results_go_to_a_new_folder(self, shapes_run, tmp_path, call):
        options = ["--warmup", 0, "--repeats", 1, "--out", tmp_path / "new/speed.json"]
        call(speedtest, shapes_run, *OPTIONS, *options)
        assert (tmp_path / "new/speed.json").exists()


class TestOperations:
    def test_parts_add_up(self, shapes_run, call):
        lines = call(flops, shapes_run, *OPTIONS, "--enc-dec", *GRAPH).splitlines()
        values = {line.split(":")[0]: float(line.split()[1]) for line in lines[1:5]}
        assert values["GFLOPs"] == pytest.approx(values["encoder"] + values["decoder"] + values["rest"], abs=0.002)
        assert lines[0] == "3 images of 32 x 32 pixels"
        assert lines[-1].startswith("not counted") and "gelu" in lines[-1]

    def test_wrong_input_is_refused(self, shapes_run, refused):
        assert "1 to 3" in refused(flops, shapes_run, *OPTIONS, "--patch-type", "graph", "--selected-layer", 4)
        assert "no checkpoint" in refused(flops, shapes_run / "nothing", *OPTIONS)


class TestProfile:
    def test_merging_has_a_share_and_a_trace(self, shapes_run, tmp_path, call):
        trace = tmp_path / "trace.json"
        printed = call(profile_model, shapes_run, *OPTIONS, *GRAPH, "--out", trace, "--rows", 5)
        names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
        assert {profile_model.FORWARD, profile_model.MERGE} <= names
        share = float(printed.split("ms, ")[1].split(" %")[0])
        assert 0 < share < 100

    def test_a_plain_model_merges_nothing(self, shapes_run, tmp_path, call):
        printed = call(profile_model, shapes_run, *OPTIONS, "--out", tmp_path / "trace.json")
        assert "0.00 ms, 0.0 % of it" in printed


class TestTokens:
    def test_counts_and_sizes_per_layer(self, shapes_run, tmp_path, call):
        merging = ["--patch-type", "tome", "--r", 2]
        call(token_stats, shapes_run, *OPTIONS, *merging, "--out", tmp_path)
        layers = json.loads((tmp_path / "tokens.json").read_text())["layers"]
        assert [row["tokens"]["mean"] for row in layers] == [14, 12, 10]
        assert layers[0]["sizes"]["q05"] >= 2 and layers[0]["n_patches"] == 16
        assert (tmp_path / "tokens.png").stat().st_size > 1000

    @pytest.mark.parametrize(
        ("merging", "left"),
        [
            (["random", "--tokens", 6, "--selected-layers", 2], [16, 6, 6]),
            (["expedit", "--cluster-grid", 2, 2, "--selected-layers", 1, "--restore-at", 2], [4, 16, 16]),
        ],
    )
    def test_any_one_layer(self, merging, left, shapes_run, tmp_path, call):
        for layer_id, count in enumerate(left):
            how = ["--patch-type", *merging, "--layer-id", layer_id, "--out", tmp_path]
            printed = call(token_stats, shapes_run, *OPTIONS, *how)
            assert [line.split()[0] for line in printed.splitlines()[1:3]] == [str(layer_id + 1)] * 2
            (row,) = json.loads((tmp_path / "tokens.json").read_text())["layers"]
            assert row["tokens"]["mean"] == count and (row["sizes"] is None) == (count == 16)

    def test_a_layer_that_is_not_there_is_refused(self, shapes_run, refused):
        message = refused(token_stats, shapes_run, *OPTIONS, "--patch-type", "graph", "--layer-id", 3)
        assert "--layer-id 3: the encoder has layers 0 to 2" in message

    def test_a_plain_model_has_no_token_statistics(self, shapes_run, refused):
        assert "--patch-type" in refused(token_stats, shapes_run, *OPTIONS)

    def test_sizes_are_those_of_the_reduction(self, shapes_run):
        model = Run.load(shapes_run, device="cpu", patch_type="graph", threshold=0.5).model
        views = [torch.randn(2, 3, 32, 32) * scale for scale in (0.1, 3)]
        found = token_stats.collect(model, views)[2]
        counts, sizes = [], []
        for view in views:
            counts += count_tokens(model, view).tolist()
            sizes += [size for size in patch.reduction(model).sizes.flatten().tolist() if size > 1]
        assert found["counts"].tolist() == counts and sorted(found["sizes"]) == sorted(sizes)
        assert count_tokens(patch.remove(model), views[0]).tolist() == [16, 16]

    def test_tokens_that_are_no_groups_have_sizes_that_are_no_integers(self, shapes_run, tmp_path, call):
        call(token_stats, shapes_run, *OPTIONS, "--patch-type", "dct", "--r", 2, "--out", tmp_path)
        layers = json.loads((tmp_path / "tokens.json").read_text())["layers"]
        assert [(row["n_patches"], row["tokens"]["mean"]) for row in layers] == [(16, 14), (16, 12), (16, 10)]
        assert 1 < layers[0]["sizes"]["median"] < 2 and (tmp_path / "tokens.png").stat().st_size > 1000
