"""The search for settings of a run that are as good and faster: measurements that are kept, and successive halving."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from patch.budget import options_for
from patch.trials import interleaved_trials, speed
from segm.config import BFLOAT16, EXPORTED, FLOAT32, OPENVINO_BFLOAT16, OPENVINO_INT8
from segm.data import spread
from segm.data.dataset import Part
from segm.eval.evaluate import Views, evaluate
from segm.eval.sliding import upscale_to_window, window_starts
from segm.exported import open_run, runtime_of
from segm.exporting import N_CALIBRATION, export, quantize
from segm.merging import PURE, layer_tokens
from segm.precision import Precision
from segm.run import Run
from segm.storage import write_text

PRESETS = {"equal": 1, "balanced": 3, "fast": 10}  # name -> mIoU that it may lose, × what "equal" may
FIRST, STRIDE = 4, 7  # images of the first round; settings between one and the next that is scored
N_VIEWS, N_TIMED = 2, 3  # images that thresholds are found and curves timed with; that the last settings are timed with
CURVE = (0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)  # of the tokens, at which a block is timed
SMALL = 0.01  # of the labeled pixels: a class that covers less is small
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A way to use a run: shorter side of the images in pixels, merging, precision."""

    im_size: int
    method: str = PURE
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: str = FLOAT32

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> str:
        """Tells settings apart, also across files."""
        return json.dumps([self.im_size, self.method, self.options, self.precision], sort_keys=True, default=list)

    def __str__(self) -> str:
        words = (f"{name} {' '.join(map(str, np.atleast_1d(value)))}" for name, value in self.options.items())
        return ", ".join((f"{self.im_size} pixels", self.method, *words, self.precision))


def search(
    settings: Sequence[Setting],
    loss: Callable[[Setting, int], float],
    ms: Callable[[Setting], float],
    images: Sequence[int],
    count: int,
    deepest: float = math.inf,
    is_late: Callable[[Setting, int], bool] = lambda *_: False,
) -> dict[Setting, float]:
    """Successive halving: all settings on few images, the half that others beat least on more, and so on.

    Args:
        settings: to choose from.
        loss: of mIoU of a setting against the plain model, on the images of all rounds up to one.
        ms: time per image of a setting that was scored.
        images: number of those that each round adds.
        count: settings in the last round.
        deepest: loss of mIoU from which on a setting is not followed.
        is_late: whether to end rather than to score a setting in a round.

    Returns:
        Every setting that was scored, with its last loss; those first that came furthest and are beaten least.
    """
    mixed = [one for first in range(STRIDE) for one in settings[first::STRIDE]]  # some of all kinds, if it ends early
    alive, losses = mixed, dict[Setting, float]()
    total = sum(max(len(alive) >> number, min(count, len(alive))) * n for number, n in enumerate(images))
    with tqdm(total=total, desc="search", unit="image", leave=False) as bar:
        for number, n_images in enumerate(images):
            for one in alive:
                if is_late(one, number):
                    return {one: losses[one] for one in nearest(losses, ms, deepest)}
                losses[one] = loss(one, number)
                bar.update(n_images)
            alive = nearest({one: losses[one] for one in alive}, ms, deepest)[: max(count, len(alive) // 2)]
    return {one: losses[one] for one in (*alive, *losses)}


def nearest(losses: Mapping[Setting, float], ms: Callable[[Setting], float], deepest: float) -> list[Setting]:
    """Settings by how much more they lose than the best that is not slower; those that lose too much come last.

    Of those that nothing beats, the first few are spread from fast to slow.
    """
    best, gaps = math.inf, dict[Setting, float]()
    for one in sorted(losses, key=lambda one: (ms(one), losses[one])):
        best = min(best, losses[one])
        gaps[one] = losses[one] - best
    order = sorted(gaps, key=lambda one: (losses[one] > deepest, gaps[one]))
    n_best = sum(gaps[one] == 0 and losses[one] <= deepest for one in order)
    return [order[index] for some in rounds_of(n_best) for index in some] + order[n_best:]


def choose(rows: Sequence[Row], within: float, images_per_second: float | None) -> dict[str, Row]:
    """The row of every preset.

    Args:
        rows: `loss` of mIoU, against the plain model, and `ms`; one of them is the plain model.
        within: loss that "equal" may have.
        images_per_second: speed at which "fast" loses least; None: it is the fastest that loses 10 × within at most.
    """
    fits = {name: [row for row in rows if row["loss"] < factor * within + 1e-9] for name, factor in PRESETS.items()}
    chosen = {name: min(own, key=lambda row: row["ms"]) for name, own in fits.items()}
    if images_per_second is not None:
        fast = [row for row in rows if row["ms"] * images_per_second <= 1000]
        chosen["fast"] = min(fast or rows, key=lambda row: (row["loss"] if fast else 0, row["ms"]))
    return chosen


def rounds_of(total: int) -> list[list[int]]:
    """Positions of the images that each round adds: spread over all, and twice as many with each round."""
    sums = [spread(FIRST << number, total) for number in range(math.ceil(math.log2(max(total / FIRST, 1))) + 1)]
    return [sorted({*now} - {*before}) for before, now in zip([[], *sums], sums, strict=False)]


def mean_iou(counts: Sequence[Any]) -> float:
    """mIoU, percent, over the classes that occur in the truth: of few images, one wrong pixel would add a class.

    Args:
        counts: (3, C) of some images each: pixels that are right, true, and predicted.
    """
    right, true, predicted = np.sum(counts, axis=0)
    return 100 * float(np.mean((right / np.maximum(true + predicted - right, 1))[true > 0]))


class Memory:
    """Measurements by name, in a JSON file; raises a ValueError if it is damaged."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            self.known: Row = dict(json.loads(file.read_text())) if file.exists() else {}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file} is damaged: remove it, and the measurements in it are made again") from error

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """A measurement, as it is known, or else made and kept."""
        if name not in self.known:
            self.known[name] = json.loads(json.dumps(measure()))  # as it will be read again
            write_text(self.file, json.dumps(self.known))
        return self.known[name]


@dataclass(frozen=True)
class Bench:
    """Measures settings.

    Attributes:
        run: without merging.
        calibration, held: images to choose by, and to report on.
        memory: what was measured.
        opened: exported settings by their key; a runtime takes seconds to open a file.
    """

    run: Run
    calibration: Part
    held: Part
    memory: Memory
    opened: dict[str, Run] = field(default_factory=dict)

    @property
    def plain(self) -> Setting:
        """The run as it is, against which settings count."""
        return Setting(self.run.image_size, precision=FLOAT32 if self.run.precision.dtype is None else BFLOAT16)

    @property
    def plain_iou(self) -> float:
        """mIoU of the plain model on all images to choose by, percent."""
        return mean_iou([self.counts(self.plain, number)["classes"] for number in range(len(self.rounds))])

    @property
    def rounds(self) -> list[list[int]]:
        """See `rounds_of`."""
        return rounds_of(len(self.calibration))

    def at(self, setting: Setting) -> Run:
        """The run in a setting; raises a ValueError if that is an exported file and cannot be made."""
        if setting.key in self.opened:
            return self.opened[setting.key]
        run = self.run.with_settings(setting.method, setting.options, setting.im_size)
        if setting.precision in EXPORTED:
            how = runtime_of(setting.precision)
            exported = open_run(self._exported(run, setting), device=self.run.device, merging={}, **how)
            return self.opened.setdefault(setting.key, exported)
        return replace(run, precision=Precision.choose(self.run.device, setting.precision == BFLOAT16))

    def file_of(self, setting: Setting) -> Path:
        """The place of an exported setting; as that of measurements, it goes by weights and conditions."""
        in_file = FLOAT32 if setting.precision == OPENVINO_BFLOAT16 else setting.precision  # a choice of the runtime
        digest = hashlib.sha256(replace(setting, precision=in_file).key.encode()).hexdigest()[:8]
        return self.memory.file.with_name(f"{self.memory.file.stem}_{digest}_{in_file}.onnx")

    def _exported(self, run: Run, setting: Setting) -> Path:
        file, whole = (self.file_of(replace(setting, precision=one)) for one in (setting.precision, FLOAT32))
        if not whole.exists():
            export(run, whole)
        if not file.exists():
            views = Views(self.calibration, run.windows.size, run.normalization, N_CALIBRATION)
            # OpenVINO computes in int8 where the ranges of activations are known beforehand alone.
            quantize(whole, file, views if setting.precision == OPENVINO_INT8 else None)
        return file

    def grid(self, size: int) -> tuple[int, int]:
        """Patches of a crop at an image size, (gh, gw)."""
        return self.run.model.grid(replace(self.run, im_size=size).crop_size)

    def threshold(self, knob: str, method: str, fixed: Mapping[str, Any], share: float) -> float:
        """The threshold with which a method leaves a share of the tokens at the size of the run."""

        def measure() -> float:
            run = self.run
            views = [*Views(self.calibration, run.crop_size, run.normalization, N_VIEWS, device=run.device)]
            wanted = share * math.prod(run.model.grid(run.crop_size))
            return round(options_for(run.model, method, views, wanted, near=0.02, **fixed)[knob], 4)

        return self.memory.once(f"threshold {Setting(0, method, fixed).key} {share}", measure)

    def counts(self, setting: Setting, number: int) -> Row:
        """`classes`, see `mean_iou`, and mean `tokens` that are left after layers, of the images of a round."""

        def measure() -> Row:
            run, tokens = self.at(setting), list[dict[int, float]]()
            how: Row = {"ratios": [run.ratio], "device": run.device}
            if setting.precision not in EXPORTED:
                how["on_image"] = lambda *_: tokens.append(layer_tokens(run.model))
            with run.precision.autocast():
                confusion = evaluate(run.model, Part(self.calibration, self.rounds[number]), run.windows, **how)
            classes = torch.stack([confusion.diagonal(), confusion.sum(1), confusion.sum(0)]).tolist()
            mean = {key: float(np.mean([one[key] for one in tokens])) for key in (tokens[0] if tokens else ())}
            return {"classes": classes, "tokens": mean}

        return self.memory.once(f"counts {number} {setting.key}", measure)

    def knows(self, setting: Setting, number: int) -> bool:
        """Return whether a setting was scored on the images of a round."""
        return f"counts {number} {setting.key}" in self.memory.known

    def loss(self, setting: Setting, number: int) -> float:
        """mIoU that a setting loses against the plain model, on the images of all rounds up to one."""
        plain, own = ([self.counts(one, i)["classes"] for i in range(number + 1)] for one in (self.plain, setting))
        return mean_iou(plain) - mean_iou(own)

    def ms(self, setting: Setting, settings: Sequence[Setting]) -> float:
        """Time per image by the curve of its image size; of all settings one per method is timed with it."""
        alike = [one for one in settings if one.im_size == setting.im_size and one.method != PURE]
        groups = {one.method: [other for other in alike if other.method == one.method] for one in alike}
        samples = {method: own[len(own) // 2] for method, own in groups.items()}
        key = f"curve {setting.im_size} {' '.join(one.key for one in samples.values())}"
        timing = self.memory.once(key, partial(self._time, setting.im_size, samples))
        return self._by_curve(setting, timing) + timing["extra"].get(setting.method, 0.0)

    def _by_curve(self, setting: Setting, timing: Row) -> float:
        """Time per image of the plain model, less that of the tokens that have merged."""
        tokens = {int(layer): n for layer, n in self.counts(setting, 0)["tokens"].items()}
        lengths, times = timing["curve"]
        saved, before = 0.0, tokens.get(0, lengths[-1])
        for layer in range(1, timing["depth"] + 1):
            after = tokens.get(layer, before)  # attention sees those before, the MLP those after
            saved += times[-1] - np.interp([before, after], lengths, times).mean()
            before = after
        return timing["plain"] - timing["passes"] * saved

    def _time(self, size: int, samples: Mapping[str, Setting]) -> Row:
        """At an image size, interleaved: the plain model, one setting per method, and a block over tokens."""
        plain, photos = self.at(replace(self.plain, im_size=size)), self._photos(N_VIEWS)
        sides = upscale_to_window(plain.preprocess(photos[0][0]), plain.windows.size).shape[-2:]
        places = zip(sides, plain.windows.size, plain.windows.stride, strict=True)
        n_windows = math.prod(len(window_starts(*one)) for one in places)
        batch, depth = min(n_windows, plain.windows.batch_size), len(plain.model.encoder.blocks)
        lengths = [max(round(share * math.prod(plain.model.grid(plain.windows.size))), 1) for share in CURVE]
        calls: dict[Any, Callable[[Any], Any]] = {PURE: plain.predict}
        calls |= {method: self.at(one).predict for method, one in samples.items()}
        calls |= {n: partial(_run_block, plain, batch, n) for n in lengths}
        trials = interleaved_trials(calls, photos, plain.device, repeats=5, warm=True)
        times = {name: 1000 / own.max().item() for name, own in trials.items()}  # what else runs only slows
        timing: Row = {"plain": times[PURE], "curve": [lengths, [times[n] for n in lengths]]}
        timing |= {"passes": n_windows / batch, "depth": depth}
        extra = {method: times[method] - self._by_curve(one, timing) for method, one in samples.items()}
        return timing | {"extra": extra}

    def _photos(self, count: int) -> list[list[np.ndarray]]:
        """Batches of one photograph, spread over the images to choose by."""
        return [[self.calibration[index].image] for index in spread(count, len(self.calibration))]

    def rows(self, settings: Sequence[Setting]) -> list[Row]:
        """Measurements on all images to choose by: `setting`, `loss`, `ms` from a photograph to its labels, all
        interleaved, `images_per_second`, and `ratio` to the first setting."""
        bar = tqdm(settings, desc="finalists", unit="setting", leave=False)
        losses = [[self.loss(one, number) for number in range(len(self.rounds))][-1] for one in bar]

        def measure() -> list[float]:
            calls = {number: self.at(one).predict for number, one in enumerate(settings)}
            photos = self._photos(N_TIMED)
            trials = interleaved_trials(calls, photos, self.run.device, warmup=1, warm=True, progress=True)
            return [1000 / speed(own) for own in trials.values()]

        times = self.memory.once(f"times {' '.join(one.key for one in settings)}", measure)
        return [
            {"setting": one, "loss": loss, "ms": ms, "images_per_second": 1000 / ms, "ratio": times[0] / ms}
            for one, loss, ms in zip(settings, losses, times, strict=True)
        ]

    def report(self, setting: Setting) -> Row:
        """Scores on the held-out images, percent: `mean_iou`, `small_iou` of small classes, `boundary_iou`."""
        how: Row = {"dataset": self.held, "boundary": True, "progress": True}
        scores = self.memory.once(f"report {setting.key}", lambda: self.at(setting).evaluate(**how))
        true = np.sum([self.counts(self.plain, i)["classes"][1] for i in range(len(self.rounds))], axis=0)
        pairs = zip(scores["per_class_iou"], true / true.sum(), strict=True)
        small = [iou for iou, share in pairs if iou is not None and 0 < share < SMALL]
        small_iou = float(np.mean(small)) if small else math.nan
        return {"mean_iou": scores["mean_iou"], "small_iou": small_iou, "boundary_iou": scores["boundary_iou"]}


def _run_block(run: Run, batch: int, n_tokens: int, *_: Any) -> None:
    """Run a block in the middle of the encoder on noise."""
    encoder = run.model.encoder
    x = torch.randn(batch, n_tokens + encoder.num_prefix_tokens, encoder.embed_dim, device=run.device)
    with run.precision.autocast():
        encoder.blocks[len(encoder.blocks) // 2](x)
