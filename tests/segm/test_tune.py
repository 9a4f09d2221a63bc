"""Settings that are as good and faster: the search, what it writes, and who reads it."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import yaml

import patch
from segm import report, search, speedtest, test, train, tune, tune_threshold
from segm.checkpoint import load_checkpoint, save_checkpoint, weights_digest
from segm.config import TUNED, Merging, Preset
from segm.data import create_dataset
from segm.data.dataset import Part
from segm.eval import miou
from segm.model.segmenter import Segmenter
from segm.run import Run
from segm.search import Setting, choose, mean_iou, nearest, rounds_of
from tests.helpers import read_variant

CPU = ["--device", "cpu"]
SETTINGS = [Setting(size, "tome", {"r": r}) for size in range(100, 200, 10) for r in range(8)]
PLAIN = {"setting": Setting(32), "loss": 0.0, "ms": 10.0}

LOSSES = {7.0: 0.3, 6.0: 0.31, 5.0: 0.9, 3.0: 3.0, 1.0: 3.1}  # ms -> mIoU
ROWS = [PLAIN, *({"setting": Setting(int(ms)), "loss": loss, "ms": ms} for ms, loss in LOSSES.items())]


@pytest.fixture
def run(shapes_run, monkeypatch):
    """A run on few images, which are small."""
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 3, "val": 6})
    return shapes_run


@pytest.fixture
def counted(monkeypatch):
    """What is measured: the images of every call, and how many calls were timed together."""
    scored, timed, score, trials = [], [], search.evaluate, search.interleaved_trials

    def evaluate(model, dataset, *rest, **how):
        scored.append([sample.name for sample in (dataset[index] for index in range(len(dataset)))])
        return score(model, dataset, *rest, **how)

    def interleaved(calls, *rest, **how):
        timed.append(len(calls))
        return trials(calls, *rest, **how | {"repeats": 1, "warmup": 0})

    monkeypatch.setattr(search, "evaluate", evaluate)
    monkeypatch.setattr(search, "interleaved_trials", interleaved)
    return scored, timed


def milliseconds(setting):
    return setting.im_size - 10 * setting.options["r"]


def noisy_loss(setting, number):
    """One loses nothing and is as fast as others; few images make all look better or worse than they are."""
    true = 0.0 if setting == SETTINGS[3] else 1 + (180 - milliseconds(setting)) / 50
    return true + 0.4 * math.sin(7 * SETTINGS.index(setting) + number) / 2**number


class TestSearch:
    def test_finds_what_is_best(self):
        asked = []

        def loss(setting, number):
            asked.append((setting, number))
            return noisy_loss(setting, number)

        found = search.search(SETTINGS, loss, milliseconds, [4, 4, 8, 16], 8)
        assert SETTINGS[3] in [*found][:8] and {*found} == {*SETTINGS}
        assert all(milliseconds(one) <= milliseconds(SETTINGS[3]) for one in [*found][:8])  # the others lose more
        assert [sum(number == one for _, one in asked) for number in range(4)] == [80, 40, 20, 10]

    def test_ends_when_it_is_late_and_keeps_what_was_scored(self):
        asked = []

        def loss(setting, number):
            asked.append(setting)
            return 1.0

        found = search.search(SETTINGS, loss, milliseconds, [4, 4], 8, is_late=lambda *_: len(asked) == 5)
        assert {*found} == {*SETTINGS[::7][:5]} and len(asked) == 5
        assert search.search(SETTINGS, None, None, [4], 8, is_late=lambda *_: True) == {}

    def test_settings_that_lose_too_much_are_not_followed(self):
        losses = {Setting(1): 9.0, Setting(2): 1.0, Setting(3): 1.5, Setting(4): 0.0}
        assert [one.im_size for one in nearest(losses, lambda one: one.im_size, 5)] == [2, 4, 3, 1]
        assert [one.im_size for one in nearest(losses, lambda one: one.im_size, math.inf)] == [1, 2, 4, 3]

    def test_of_those_that_nothing_beats_fast_and_slow_ones_come_first(self):
        losses = {Setting(size): 20.0 - size for size in range(1, 21)}
        assert {one.im_size for one in nearest(losses, lambda one: one.im_size, 15)[:4]} == {5, 9, 13, 17}

    def test_rounds_hold_every_image_once(self):
        for total in (1, 3, 4, 5, 51, 64):
            rounds = rounds_of(total)
            assert sorted(index for one in rounds for index in one) == [*range(total)] and all(rounds)
        assert [len(one) for one in rounds_of(51)] == [4, 4, 8, 16, 19]

    def test_classes_that_are_not_there_do_not_count(self):
        """Of 10 pixels of each of two classes 5 are right; one pixel more is taken for a third class."""
        assert mean_iou([[[5, 5, 0], [10, 10, 0], [9, 10, 1]]]) == pytest.approx(50 * (5 / 14 + 5 / 15))
        both = [[[5, 0], [10, 0], [5, 0]], [[0, 4], [0, 4], [0, 4]]]
        assert mean_iou(both) == 75


class TestChoice:
    def test_presets_are_the_fastest_within_a_loss(self):
        chosen = choose(ROWS, 0.3, None)
        assert {name: row["setting"].im_size for name, row in chosen.items()} == {"equal": 7, "balanced": 5, "fast": 3}
        assert {row["setting"].im_size for row in choose(ROWS[:1], 0.3, None).values()} == {32}

    def test_fast_is_the_best_at_a_speed(self):
        assert [choose(ROWS, 0.3, speed)["fast"]["ms"] for speed in (100, 150, 250, 1e6)] == [10, 6, 3, 1]

    def test_remarks_say_what_did_not_hold(self):
        rows = {name: row | {"mean_iou": 70.0} for name, row in choose([PLAIN], 0.3, None).items()}
        reported = {"pure": PLAIN | {"mean_iou": 70.5}} | rows
        lines = [*tune.remarks(reported, 0.3, None)]
        assert "equal is the plain model" in lines[0] and lines[1] == "equal: lost 0.50 held-out, more than 0.3"
        assert len(lines) == 2
        slow = {name: row | {"images_per_second": 100} for name, row in reported.items()}
        assert "nothing reaches 200 images/s" in "".join(tune.remarks(slow, 0.3, 200))


OPTIONS = ["--methods", "tome", "--im-size", 32, 24, "--precision", "float32", *CPU]


def test_it_finds_settings_that_every_command_takes(run, counted, call, refused):
    scored, timed = counted
    text = call(tune, run, "shapes", *OPTIONS)
    assert text.startswith("8 settings of pure, tome; chosen by every second image of val")
    assert timed[:2] == [9, 9] and len(timed) == 3  # plain, tome and a block, per size; and the last settings
    val = create_dataset("shapes", "val", image_size=32)
    assert {name for names in scored for name in names} == {val[index].name for index in (0, 2, 4)}
    tuned = yaml.safe_load((run / TUNED).read_text())
    assert tuned["dataset"] == "shapes" and [*tuned["presets"]] == ["equal", "balanced", "fast"]
    assert tuned["plain"]["ratio"] == 1 and (run / "tune").glob("*.png")
    held = Run.load(run, device="cpu").evaluate(dataset=Part(val, [1, 3, 5]))
    assert tuned["plain"]["mean_iou"] == held["mean_iou"]

    scored.clear(), timed.clear()
    assert call(tune, run, "shapes", *OPTIONS) == text and not scored and not timed

    tuned["presets"]["fast"] |= {"merging": {"patch_type": "tome", "r": 3}, "im_size": 24, "precision": "bfloat16"}
    (run / TUNED).write_text(yaml.safe_dump(tuned, sort_keys=False))
    assert "mean_iou" in call(test, run, "--preset", "fast", "--max-images", 1, *CPU)
    assert "equal, balanced, fast" in refused(test, run, "--preset", "slow", *CPU)
    timing = ["--warmup", 0, "--max-images", 1, *CPU]
    assert "| tome | 2.0 |" in call(speedtest, run, "shapes", "--preset", "fast", *timing)


def test_an_interrupted_search_goes_on(run, counted, call, refused, monkeypatch):
    scored, _ = counted
    score = search.evaluate

    def evaluate(*rest, **how):
        if len(scored) == 7:
            raise ValueError("interrupted")
        return score(*rest, **how)

    monkeypatch.setattr(search, "evaluate", evaluate)
    assert "interrupted" in refused(tune, run, "shapes", *OPTIONS) and not (run / TUNED).exists()
    monkeypatch.setattr(search, "evaluate", score)
    call(tune, run, "shapes", *OPTIONS)
    assert len(scored) == 8  # every setting once


def test_minutes_end_the_search(run, counted, call):
    scored, _ = counted
    text = call(tune, run, "shapes", *OPTIONS, "--minutes", 1e-9)
    assert "the search ended after 1e-09 minutes" in text and "equal is the plain model" in text
    assert len(scored) == 1 and (run / TUNED).exists()  # the plain model
    full = call(tune, run, "shapes", *OPTIONS)
    assert call(tune, run, "shapes", *OPTIONS, "--minutes", 1e-9) == full  # what is known takes no time


def test_thresholds_are_tried_to_the_end(run, counted, call, refused, capsys):
    given = [run, "shapes", "--precision", "float32", *CPU]
    text = call(tune, *given, "--methods", "graph --selected-layer 1", "--thresholds", 1, 0.8, 0.1)
    assert text.count("threshold 0.") == 2 + text.split("preset")[1].count("threshold 0.")
    assert "lowest threshold without loss: " in text
    (file,) = (run / "tune").glob("*.json")
    known = set(json.loads(file.read_text()))
    forward = ["--patch-type", "graph", "--selected-layer", 1, "--lowest", 0.8, "--step", 0.1]
    assert call(tune_threshold, run, "shapes", *forward, *CPU) == text
    assert set(json.loads(file.read_text())) == known
    assert "graph, algm" in refused(tune, *given, "--methods", "tome", "--thresholds", 1, 0.8, 0.1)
    assert "graph, algm" in refused(tune_threshold, run, "shapes", *CPU)
    assert "1 >= highest" in refused(tune, *given, "--methods", "graph", "--thresholds", 1, -2, 0.1)


def test_the_lowest_threshold_without_loss_is_that_of_all():
    rows = [PLAIN] + [PLAIN | {"setting": Setting(32, "graph", {"threshold": t}), "loss": loss} for t, loss in (
        (0.9, -0.1), (0.8, 0.1), (0.7, 0.0), (0.6, 0.5))]  # fmt: skip
    assert tune.without_loss(rows) == "lowest threshold without loss: 0.7"
    assert tune.without_loss([rows[0], rows[2]]).endswith("none")
    assert tune.without_loss(rows, spare=0.5).endswith("0.6") and tune.without_loss(rows, spare=-0.1).endswith("0.9")


def test_the_lowest_threshold_keeps_the_miou_of_a_baseline(run, counted, call, refused, tmp_path, monkeypatch):
    """A baseline that is worse by 1 lets a threshold lose 1."""
    baseline = tmp_path / "baseline"
    shutil.copytree(run, baseline)
    other_weights(baseline)
    plain, name = {run.name: 50.0, "baseline": 49.0}, "segm.search.Bench.plain_iou"
    monkeypatch.setattr(name, property(lambda bench: plain[bench.run.folder.name]))
    monkeypatch.setattr("segm.search.Bench.loss", lambda bench, one, number: 10 * (1 - one.options.get("threshold", 1)))
    given = [run, "shapes", "--precision", "float32", "--methods", "graph --selected-layer 1", *CPU]
    thresholds = ["--thresholds", 0.96, 0.84, 0.06]
    assert "without loss: none" in call(tune, *given, *thresholds)
    assert "without loss: 0.9\n" in call(tune, *given, *thresholds, "--baseline", baseline)
    assert "give --thresholds too" in refused(tune, *given, "--baseline", baseline)


def test_images_to_choose_by_are_others_than_those_reported(run):
    loaded = Run.load(run, device="cpu")
    halves, _ = tune.set_up(loaded, "shapes", "val", None)
    assert (halves.calibration.indices, halves.held.indices) == ([0, 2, 4], [1, 3, 5])
    few, _ = tune.set_up(loaded, "shapes", "val", 2)
    assert (few.calibration.indices, few.held.indices) == ([0, 2], [1, 3])
    train_split, rule = tune.set_up(loaded, "shapes", "train", None)
    assert train_split.calibration.split == "train" and train_split.held.indices == [*range(6)]
    assert "differences, not levels" in rule
    assert len({one.memory.file for one in (halves, few, train_split)}) == 3


def test_a_damaged_file_of_measurements_is_named(run, refused):
    bench, _ = tune.set_up(Run.load(run, device="cpu"), "shapes", "val", None)
    bench.memory.file.parent.mkdir()
    bench.memory.file.write_text("[1")
    assert "remove it" in refused(tune, run, "shapes", *OPTIONS)


def test_the_method_of_the_run_keeps_its_layers_and_gets_other_budgets(run):
    loaded = Run.load(run, device="cpu", patch_type="pure")
    recorded = {"threshold": 0.5, "tokens": 0.6, "selected_layer": 3, "attention": "inverse"}
    trained = replace(loaded, config=replace(loaded.config, merging=Merging("graph", recorded)))
    assert tune.fixed_options(trained, None)["graph"] == {"layers": 3, "attention": "inverse"}
    assert tune.layer_choices("graph", trained, {"layers": 3}) == [{"layers": [3]}]
    fixed = tune.fixed_options(loaded, tune.read_methods("graph --tokens 0.4,tome"))
    assert fixed == {"graph": {"tokens": 0.4}, "tome": {}}
    bench, _ = tune.set_up(loaded, "shapes", "val", None)
    found = [(one.method, one.options) for one in tune.candidates(bench, fixed, [32])]
    assert [options for method, options in found if method == "graph"] == 3 * [{"tokens": 0.4, "layers": [2]}]
    assert [options["r"] for method, options in found if method == "tome"] == [1, 2, 3, 4]


def other_weights(run):
    """Weights in the place of others, as after more training."""
    weights = load_checkpoint(run)["model"]
    save_checkpoint(
        {"model": weights | {"encoder.norm.bias": weights["encoder.norm.bias"] + 1}}, run / "checkpoint.pth"
    )


def test_measurements_and_int8_files_go_by_weights_and_settings(run):
    def bench():
        return tune.set_up(Run.load(run, device="cpu"), "shapes", "val", None)[0]

    def files():
        return bench().memory.file, bench().file_of(replace(bench().plain, precision="int8"))

    before = files()
    (run / "checkpoint.pth").touch()  # a date alone is nothing
    assert files() == before
    other_weights(run)
    other = files()
    variant = read_variant(run)
    variant["inference_kwargs"]["window_stride"] = 16
    (run / "variant.yml").write_text(yaml.safe_dump(variant))
    assert all(len({*names}) == 3 for names in zip(before, other, files(), strict=True))


def test_the_digest_of_weights_is_that_of_all_formats(run, tmp_path):
    loaded = Run.load(run, device="cpu", patch_type="tome")
    loaded.save_pretrained(tmp_path / "shared")
    found = {weights_digest(load_checkpoint(one)["model"]) for one in (run, tmp_path / "shared")}
    assert found == {weights_digest(loaded.model.state_dict())}
    assert weights_digest({"a": torch.tensor(1)}) != weights_digest({"a": torch.tensor(2)})


def test_the_number_of_images_is_told(run):
    loaded = Run.load(run, device="cpu")
    assert tune.set_up(loaded, "shapes", "val", None)[1].endswith("; 3 and 3 images")
    assert tune.set_up(loaded, "shapes", "val", 2)[1].endswith("; 2 and 2 images")


def test_budgets_that_a_size_does_not_have_are_left_out(run):
    loaded = Run.load(run, device="cpu")
    fixed = tune.fixed_options(loaded, tune.read_methods("graph --tokens 12 --selected-layer 1"))
    bench, _ = tune.set_up(loaded, "shapes", "val", None)
    assert [one.im_size for one in tune.candidates(bench, fixed, [32, 24]) if one.method == "graph"] == [32]


def test_another_data_set_is_scored_at_the_size_of_the_run(run, monkeypatch):
    loaded = Run.load(run, device="cpu")
    other = create_dataset("shapes", "val", image_size=48)
    monkeypatch.setattr(Run, "open", lambda *_: (other, loaded.windows))
    bench, _ = tune.set_up(loaded, "other", "val", None)
    assert bench.held.image_size == bench.calibration.image_size == loaded.image_size == 32


def test_a_method_is_named_once(run, refused):
    given = [run, "shapes", *CPU, "--methods"]
    assert "graph twice" in refused(tune, *given, "graph --selected-layer 1,graph --selected-layer 2")
    assert "name one method that has a threshold" in refused(tune_threshold, run, "shapes", *CPU)


def test_a_size_without_its_plain_model_says_so():
    rows = [PLAIN, PLAIN | {"setting": Setting(24, "graph", {"threshold": 0.9})}]
    assert tune.without_loss(rows).endswith("not known, the search ended early (24 pixels)")


class TestPreset:
    @pytest.fixture
    def tuned(self, run):
        """A run whose variant says graph, with presets."""
        entries = {"patch_type": "tome", "r": 3, "attention": "proportional"}
        one = {
            "merging": entries,
            "im_size": 24,
            "precision": "bfloat16",
            "mean_iou": 1.0,
            "boundary_iou": 2.0,
            "ms": 3.0,
        }
        content = {"dataset": "shapes", "device": "a CPU", "plain": one, "presets": {"equal": one, "fast": one}}
        (run / TUNED).write_text(yaml.safe_dump(content))
        variant = read_variant(run)
        variant["dataset_kwargs"] |= {"patch_type": "graph", "threshold": 0.5, "selected_layer": 1}
        (run / "variant.yml").write_text(yaml.safe_dump(variant))
        return run

    def test_what_is_given_goes_first_then_the_preset_then_the_variant(self, tuned):
        load = partial(Run.load, tuned, device="cpu")
        assert load().method == "graph" and load().image_size == 32 and load().precision.dtype is None
        run = load(preset="equal")
        assert (run.method, run.options["r"], run.crop_size) == ("tome", 3, (24, 24))
        assert run.precision.dtype == torch.bfloat16
        assert load(merging={"preset": "equal"}).merging == run.merging  # as commands give it
        assert load(preset="equal", r=5).options["r"] == 5 and load(preset="equal", patch_type="pure").method == "pure"
        assert load(preset="equal", im_size=16).crop_size == (16, 16)
        assert load(preset="equal", scale="original").im_size is None
        assert load(preset="equal", amp=False).precision.dtype is None
        assert run.resolve_merging({"r": 1})[0] == "tome"

    def test_what_is_not_there_is_named(self, tuned, call, refused):
        with pytest.raises(ValueError, match="equal, fast"):
            Run.load(tuned, preset="other")
        assert "--finetune" in refused(train, "--log-dir", tuned.parent / "new", "--preset", "equal", *CPU)
        (tuned / TUNED).write_text("presets: {equal: 1}")
        with pytest.raises(ValueError, match="damaged"):
            Run.load(tuned, preset="equal")
        (tuned / TUNED).unlink()
        with pytest.raises(FileNotFoundError, match=r"g2tm tune"):
            Run.load(tuned, preset="equal")

    def test_a_training_takes_its_merging(self, tuned, tmp_path, call, monkeypatch):
        found = []
        monkeypatch.setattr(train.Trainer, "fit", lambda self: found.append((self.model, self.config.data.im_size)))
        call(train, "--log-dir", tmp_path / "new", "--finetune", tuned, "--preset", "equal", "--r", 2, *CPU)
        ((model, size),) = found
        assert (patch.method(model), patch.options(model)["r"], size) == ("tome", 2, 32)

    def test_the_same_command_resumes_it(self, tuned, tmp_path, call, monkeypatch):
        command = ["--log-dir", tmp_path / "new", "--finetune", tuned, "--preset", "equal", "--resume", *CPU]
        found = []
        monkeypatch.setattr(train.Trainer, "fit", lambda self: found.append(self))
        call(train, *command)
        found[0].config.write(tmp_path / "new")
        found[0].save()
        (tuned / TUNED).unlink()  # what is resumed knows its merging
        call(train, *command)
        assert [(patch.method(one.model), patch.options(one.model)["r"]) for one in found] == [("tome", 3)] * 2

    def test_other_weights_are_noticed(self, tuned, caplog, tmp_path):
        content = yaml.safe_load((tuned / TUNED).read_text())
        content["weights"] = weights_digest(load_checkpoint(tuned)["model"])
        content["presets"]["fast"] = content["plain"] | {"precision": "int8", "file": "tune/1_int8.onnx"}
        (tuned / TUNED).write_text(yaml.safe_dump(content))
        (tuned / "tune").mkdir()
        (tuned / "tune/1_int8.onnx").touch()
        Run.load(tuned, device="cpu").save_pretrained(tmp_path / "shared")
        for folder in (tuned, tmp_path / "shared"):
            assert Preset.read(folder, "equal").im_size == Preset.read(folder, "fast").im_size == 24
        assert not caplog.text
        other_weights(tuned)
        assert Run.load(tuned, device="cpu", preset="equal").method == "tome"
        assert "made for other weights" in caplog.text and "run g2tm tune again" in caplog.text
        with pytest.raises(
            ValueError, match=r"'fast' is an exported file \(int8\), and .* other weights .*run g2tm tune again"
        ):
            Run.load(tuned, device="cpu", preset="fast")

    def test_an_exported_model_is_not_passed_on(self, tuned, tmp_path):
        exported = replace(
            Run.load(tuned, device="cpu"), model=torch.nn.Identity()
        )  # as `ExportedModel`, without weights
        with pytest.raises(ValueError, match="no weights to write"):
            exported.save_pretrained(tmp_path / "shared")
        assert not (tmp_path / "shared").exists()

    def test_it_is_passed_on(self, tuned, tmp_path):
        Run.load(tuned, device="cpu", preset="equal").save_pretrained(tmp_path / "shared")
        assert "| `equal` | 1.00 | 2.00 | 3 |" in (tmp_path / "shared/README.md").read_text()
        assert Run.load(tmp_path / "shared", device="cpu", preset="fast").options["r"] == 3


@pytest.mark.parametrize(
    "precision",
    [
        pytest.param("int8", marks=pytest.mark.slow),
        pytest.param("openvino-bfloat16", marks=pytest.mark.nightly),
        pytest.param("openvino-int8", marks=pytest.mark.nightly),
    ],
)
def test_an_exported_setting_is_an_exported_run(run, call, refused, tmp_path, precision):
    bench, _ = tune.set_up(Run.load(run, device="cpu"), "shapes", "val", None)
    other = replace(bench.plain, precision=precision)
    unused = bench.memory.file.with_name("0_int8.onnx")
    unused.parent.mkdir()
    unused.touch()
    reported = {name: {"setting": one} | bench.report(one) for name, one in (("pure", bench.plain), ("equal", other))}
    tune.write_tuned(bench, {"dataset": "shapes"}, {name: row | {"ms": 1.0} for name, row in reported.items()})
    assert [*(run / "tune").glob("*.onnx")] == [bench.file_of(other)]  # the other one is gone
    exported = Run.load(run, device="cpu", preset="equal")
    assert exported.evaluate(dataset=bench.held)["mean_iou"] == reported["equal"]["mean_iou"]
    assert "are fixed" in refused(test, run, "--preset", "equal", "--im-size", 16, *CPU)
    assert isinstance(report.open_runs([f"fast={run} --preset equal"], None, exported.device)[0].model, Segmenter)
    call(miou, run, "shapes", "--preset", "equal", "--max-images", 1, *CPU)
    (entry,) = miou.read_entries(run / "scores_ss.yml")
    assert (entry["conditions"]["checkpoint"], entry["conditions"]["precision"]) == ("checkpoint.pth", precision)
    named = Run.load(run, device="cpu", preset="equal", name="mine")
    assert (exported.name, named.name, exported.folder) == (run.name, "mine", run)
    with pytest.raises(ValueError, match="no weights to write"):
        exported.save_pretrained(tmp_path / "empty")
    assert isinstance(Run.load(run, device="cpu", preset="equal", amp=False).model, Segmenter)
    Run.load(run, device="cpu").save_pretrained(tmp_path / "shared")
    assert not isinstance(Run.load(tmp_path / "shared", device="cpu", preset="equal").model, Segmenter)
