"""Find settings of a run that are as good and faster: image size, merging and precision, measured on this machine."""

import hashlib
import json
import math
import shlex
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import yaml
from tqdm import tqdm

import patch
from patch.budget import KNOBS, knob_of
from segm import cli
from segm.checkpoint import checkpoint_file, weights_digest
from segm.config import BFLOAT16, EXPORTED, FLOAT32, INT8, OPENVINO_BFLOAT16, OPENVINO_INT8, PRECISIONS, TUNED
from segm.data import fingerprint, spread
from segm.data.dataset import Part
from segm.eval.timing import environment
from segm.merging import PURE, PluginCommand, parse
from segm.precision import computes_bfloat16
from segm.run import Run
from segm.search import PRESETS, Bench, Memory, Row, Setting, choose, search
from segm.storage import write_picture, write_text
from vis import hull, search_plot

METHODS = ("keymatch", "tome", "algm", "graph")
SHARES = (0.8, 0.6, 0.45, 0.3)  # of the tokens
FACTORS = (1.0, 0.87, 0.75, 0.65, 0.55)  # of the image size
SHIFTS = (1 / 6, -1 / 12)  # of merging layers, × depth; without one they are tried as well
DEEPEST = 20  # × --within: what loses more is not followed
FINALISTS = 8
FOUND = {"setting": "{setting}", "mIoU lost": "{loss:.2f}", "ms": "{ms:.1f}", "times as fast": "{ratio:.2f}"}
REPORT = {
    "preset": "{name}: {setting}",
    "mIoU": "{mean_iou:.2f}",
    "small classes": "{small}",
    "boundary IoU": "{boundary_iou:.2f}",
    "ms (images/s)": "{ms:.1f} ({images_per_second:.2f})",
    "times as fast": "{ratio:.2f}",
}


def or_none(score: float) -> str:
    """A score as text; "-" where no class is small, so that there is none."""
    return "-" if math.isnan(score) else f"{score:.2f}"


def read_methods(text: str) -> list[dict[str, Any]]:
    """ "graph --selected-layer 3,tome" -> a dict per method, as from `segm.merging.parse`."""
    return [parse(["--patch-type", *shlex.split(one)]) for one in text.split(",")]


baseline_option = click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run without merging whose mIoU the lowest of the thresholds keeps, as ALGM* does.  "
    "[default: this one, not merging]",
)


@click.command(cls=PluginCommand)
@cli.checkpoint_argument
@cli.dataset_argument
@click.option("--within", type=cli.ABOVE_ZERO, default=0.3, help='Largest loss of mIoU of "equal", percentage points.')
@click.option(
    "--images-per-second",
    type=cli.ABOVE_ZERO,
    help='Speed at which "fast" loses least.  [default: it is the fastest that loses at most 10 × --within]',
)
@click.option(
    "--minutes", type=cli.ABOVE_ZERO, default=20, help="Time to search; the last settings are scored after it."
)
@click.option(
    "--methods",
    type=cli.Parsed(read_methods),
    metavar="LIST",
    help='Methods, with options that are fixed, as in "graph --selected-layer 3,tome".  '
    f"[default: {', '.join(METHODS)}]",
)
@click.option(
    "--im-size",
    "sizes",
    cls=cli.Numbers,
    type=cli.POSITIVE,
    help="Shorter sides of the images, pixels.  [default: five, from the run's to 0.55 of it]",
)
@click.option(
    "--precision",
    "precisions",
    type=cli.Listed(str, lambda: PRECISIONS),
    help="Precisions of the last settings.  [default: those that this machine has instructions or a runtime for]",
)
@click.option(
    "--thresholds",
    type=float,
    nargs=3,
    metavar="HIGHEST LOWEST STEP",
    help="Score the one method in --methods with these, on all images.  [default: four per method and layers]",
)
@baseline_option
@click.option(
    "--calibrate",
    metavar="SPLIT",
    default="val",
    help="Split to choose by. With val, every second image is for choosing, the others for the report.",
)
@click.option(
    "--max-images", type=cli.POSITIVE, metavar="N", help="Images to choose by, and to report.  [default: all]"
)
@cli.device_option
def main(
    checkpoint: Path,
    dataset_name: str,
    within: float,
    images_per_second: float | None,
    minutes: float,
    methods: Sequence[Mapping[str, Any]] | None,
    sizes: Sequence[int] | None,
    precisions: Sequence[str] | None,
    thresholds: tuple[float, float, float] | None,
    baseline: Path | None,
    calibrate: str,
    max_images: int | None,
    device: torch.device,
) -> None:
    """Find settings of CHECKPOINT that are as good on DATASET and faster: image size, merging and precision together.

    Writes three presets to tuned.yml in the run, for --preset NAME: "equal"; "balanced", the fastest that loses at most
    3 × --within; and "fast". Interrupted or called again, it continues where it stopped.
    """
    deadline, run = time.monotonic() + 60 * minutes, Run.load(checkpoint, device=device, patch_type=PURE)
    if baseline is not None and thresholds is None:
        raise ValueError("--baseline: give --thresholds too, of which the lowest that keeps its mIoU is told")
    fixed = fixed_options(run, methods)
    bench, rule = set_up(run, dataset_name, calibrate, max_images)
    spare = 0.0
    if baseline is not None:
        other = Run.load(baseline, device=device, patch_type=PURE)
        spare = bench.plain_iou - set_up(other, dataset_name, calibrate, max_images)[0].plain_iou
    if thresholds is None:
        found = candidates(bench, fixed, sizes or default_sizes(run))
        settings = [*dict.fromkeys(tqdm(found, desc="settings", leave=False))]
    else:
        settings = over_thresholds(fixed, thresholds, sizes or [run.image_size], bench.plain)
    click.echo(f"{len(settings)} settings of {', '.join((PURE, *fixed))}; {rule}")
    count, ms = FINALISTS if thresholds is None else len(settings), partial(bench.ms, settings=settings)
    deepest = DEEPEST * within if images_per_second is None else math.inf
    rounds = [len(images) for images in bench.rounds]

    def is_late(one: Setting, number: int) -> bool:
        return time.monotonic() > deadline and not bench.knows(one, number)

    scored = search(settings, bench.loss, ms, rounds, count, deepest, is_late)
    last = [*dict.fromkeys([bench.plain, *[*scored][:count]])]
    if not all(bench.knows(one, len(rounds) - 1) for one in last):
        click.echo(f"the search ended after {minutes:g} minutes; run the same command again to continue")
    rows = measure_last(bench, last, usable_precisions(device) if precisions is None else precisions, within)
    chosen = choose(rows, within, images_per_second)
    best = [rows[index] for index in hull([row["ms"] for row in rows], [-row["loss"] for row in rows])]
    click.echo(cli.markdown(FOUND, best if thresholds is None else rows))
    reported = {PURE: rows[0]} | chosen
    reported = {name: row | {"name": name} | bench.report(row["setting"]) for name, row in reported.items()}
    click.echo(cli.markdown(REPORT, [row | {"small": or_none(row["small_iou"])} for row in reported.values()]))
    for line in remarks(reported, within, images_per_second):
        click.echo(line)
    if thresholds is not None:
        click.echo(without_loss(rows, spare) + " (not all were scored)" * (len(last) < len(settings)))
    points = [{"ms": ms(one), "loss": loss, "method": one.method} for one, loss in scored.items()]
    write_picture(bench.memory.file.with_suffix(".png"), search_plot(points, rows, chosen))
    write_tuned(bench, {"dataset": dataset_name, "images": rule}, reported)
    click.echo(f"written to {run.folder / TUNED} and {bench.memory.file.with_suffix('.png')}")


def fixed_options(run: Run, asked: Sequence[Mapping[str, Any]] | None) -> dict[str, dict[str, Any]]:
    """Method -> its fixed options: those that are asked for, and of the run's own method all but its budget.

    Args:
        asked: see `read_methods`; None: those of `METHODS` that fit the run.

    Raises:
        ValueError: options that are not allowed or do not fit the run.
    """
    found: dict[str, dict[str, Any]] = {}
    for one in [{"patch_type": name} for name in METHODS if name in patch.METHODS] if asked is None else asked:
        method, options = run.resolve_merging(one)
        if method in found:
            raise ValueError(f"--methods names {method} twice: give each method once, or call tune.py for each")
        if method == PURE:  # is tried anyhow
            continue
        options = {name: value for name, value in options.items() if name in one or name not in KNOBS}
        try:
            found |= {method: options} if layer_choices(method, run, options) else {}
        except ValueError:
            if asked is not None:
                raise
    return found


def layer_choices(method: str, run: Run, fixed: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The fixed options of a method with the layers to try, its own first; a ValueError if they do not fit the run."""
    depth = len(run.model.encoder.blocks)
    own = patch.check(method, depth, run.model.grid(run.crop_size), **fixed)["layers"]
    if len(own) == depth:  # all of them
        return [{**fixed}]
    shifted = [[layer + round(shift * depth) for layer in own] for shift in SHIFTS if "layers" not in fixed]
    choices = [[*own], *(layers for layers in shifted if layers[0] >= 1 and layers[-1] <= depth)]
    return [{**fixed, "layers": layers} for layers in choices]


def candidates(bench: Bench, methods: Mapping[str, Mapping[str, Any]], sizes: Sequence[int]) -> Iterator[Setting]:
    """The plain model at every image size, and there every method in some layers with the budgets that it can have."""
    run, precision, depth = bench.run, bench.plain.precision, len(bench.run.model.encoder.blocks)
    for size in sizes:
        yield Setting(size, precision=precision)
        for method, fixed in methods.items():
            knob = knob_of(method)
            for own in layer_choices(method, run, fixed):
                if knob is None or KNOBS.keys() & fixed:
                    with suppress(ValueError):  # more tokens than images of this size have
                        patch.check(method, depth, bench.grid(size), **own)
                        yield Setting(size, method, own, precision)
                    continue
                n_layers = len(own.get("layers", range(depth)))
                for share in SHARES:
                    r = round((1 - share) * math.prod(bench.grid(size)) / n_layers)
                    amounts = {"tokens": share, "r": r, "keep": round(share ** (1 / n_layers), 3)}
                    value = amounts[knob] if knob in amounts else bench.threshold(knob, method, own, share)
                    with suppress(ValueError):  # a layer of keymatch halves the tokens at most
                        patch.check(method, depth, bench.grid(size), **own, **{knob: value})
                        yield Setting(size, method, own | {knob: value}, precision)


def default_sizes(run: Run) -> list[int]:
    """Shorter sides from that of the run down to about half of it, whole patches, pixels."""
    side = run.model.patch_size[0]
    return [*dict.fromkeys([run.image_size, *(max(round(run.image_size * f / side), 1) * side for f in FACTORS[1:])])]


def over_thresholds(
    methods: Mapping[str, Mapping[str, Any]], bounds: tuple[float, float, float], sizes: Sequence[int], plain: Setting
) -> list[Setting]:
    """The plain model and one method with falling thresholds; raises a ValueError for others, or for wrong bounds."""
    (method, fixed), *others = [*methods.items()] or [(PURE, {})]
    if others or method == PURE or knob_of(method) != "threshold":
        names = ", ".join(name for name in patch.METHODS if knob_of(name) == "threshold")
        raise ValueError(f"--thresholds: name one method that has a threshold: --methods {{{names}}}")
    thresholds = falling(bounds)
    own = [Setting(0, method, {**fixed, "threshold": one}, plain.precision) for one in thresholds]
    return [replace(one, im_size=size) for size in sizes for one in (plain, *own)]


def falling(bounds: tuple[float, float, float]) -> list[float]:
    """Thresholds from the highest down to the lowest, from (highest, lowest, step); a ValueError if they are wrong."""
    highest, lowest, step = bounds
    if not -1 <= lowest <= highest <= 1 or step <= 0:
        raise ValueError(
            f"--thresholds {highest} {lowest} {step}: give 1 >= highest >= lowest >= -1, and a step above 0"
        )
    return np.arange(highest, lowest - step / 2, -step).round(6).clip(lowest).tolist()


def set_up(run: Run, dataset_name: str, split: str, max_images: int | None) -> tuple[Bench, str]:
    """The measuring of a run, and in words which images are which.

    Raises:
        ValueError: as `Run.open`, or a split that is too small.
    """
    val, other = (run.open(name, dataset_name)[0] for name in ("val", split))
    halves = [range(0, len(val), 2), range(1, len(val), 2)] if split == "val" else [range(len(other)), range(len(val))]
    if not all(halves):
        raise ValueError(f"{dataset_name} has {len(val)} images in val: choose by others, such as --calibrate train")
    if dataset_name != run.dataset:
        val.image_size = other.image_size = run.image_size  # scores at the size that times are taken at
    parts = zip((other, val), halves, strict=True)
    calibration, held = (Part(whole, [own[i] for i in spread(max_images, len(own))]) for whole, own in parts)
    rules = {"val": "every second image of val (the first, third, ...), reported on the others"}
    rules["train"] = "images of train, which the model knows: trust differences, not levels; reported on val"
    images = [fingerprint(one, dates=False) for one in (calibration, held)]
    conditions = [weights_digest(run.model.state_dict()), run.config.to_variant(), str(run.windows), *images]
    digest = hashlib.sha256(json.dumps([*conditions, *environment(run.device).values()]).encode()).hexdigest()
    memory = Memory(run.folder / "tune" / f"{dataset_name}_{digest[:8]}.json")
    rule = f"chosen by {rules.get(split, f'{split}, reported on val')}; {len(calibration)} and {len(held)} images"
    return Bench(run, calibration, held, memory), rule


def usable_precisions(device: torch.device) -> list[str]:
    """Precisions that may be fast: bfloat16 where the device computes in it, int8 where a runtime is installed."""
    exports = device.type == "cpu" and all(map(find_spec, ("onnx", "onnxruntime", "onnxscript")))
    in_bfloat16, openvino = computes_bfloat16(device), exports and find_spec("openvino") is not None
    quantized = [INT8] * exports + [OPENVINO_BFLOAT16] * (openvino and in_bfloat16) + [OPENVINO_INT8] * openvino
    return [FLOAT32, *[BFLOAT16] * in_bfloat16, *quantized]


def measure_last(bench: Bench, last: Sequence[Setting], precisions: Sequence[str], within: float) -> list[Row]:
    """Rows of the last settings in all precisions, the plain model first; of the best as exported files, which take
    minutes."""
    others = [replace(one, precision=other) for other in precisions if other not in EXPORTED for one in last]
    rows = bench.rows([*dict.fromkeys([*last, *others])])
    if not {*precisions} & {*EXPORTED}:
        return rows
    best = [rows[0], *choose(rows, within, None).values()]
    best += [rows[index] for index in hull([row["ms"] for row in rows], [-row["loss"] for row in rows])]
    kept = [*dict.fromkeys(row["setting"] for row in best)]
    own = [other for other in precisions if other in EXPORTED]
    files = [*dict.fromkeys(replace(one, precision=other) for one in kept[: len(PRESETS) + 1] for other in own)]
    for one in tqdm(files, desc="exporting", unit="model", leave=False):
        try:
            bench.at(one)
            kept.append(one)
        except ValueError as error:
            click.echo(f"{one}: left out, {error}")
    return bench.rows(kept)


def remarks(reported: Mapping[str, Row], within: float, images_per_second: float | None) -> Iterator[str]:
    """Lines about presets that are not what one hopes for."""
    plain, fast = reported[PURE], reported["fast"]
    if reported["equal"]["setting"] == plain["setting"]:
        yield "nothing keeps the mIoU and is faster than the plain model: equal is the plain model"
    if images_per_second is not None and fast["images_per_second"] < images_per_second:
        yield f"nothing reaches {images_per_second:g} images/s: fast is the fastest; try smaller images (--im-size)"
    for name, factor in PRESETS.items():
        lost = plain["mean_iou"] - reported[name]["mean_iou"]
        if lost > factor * within and (name != "fast" or images_per_second is None):
            yield f"{name}: lost {lost:.2f} held-out, more than {factor * within:g}"


def without_loss(rows: Sequence[Row], spare: float = 0.0) -> str:
    """In words, the lowest of all thresholds whose mIoU is not below that of the plain model (ALGM*).

    Args:
        rows: see `Bench.rows`.
        spare: mIoU that may be lost against the plain model of these weights and the same image size, since the
            baseline's is lower by so much.
    """
    lines = []
    for size in dict.fromkeys(row["setting"].im_size for row in rows):
        own = [
            row
            for row in rows
            if (row["setting"].im_size, row["setting"].precision) == (size, rows[0]["setting"].precision)
        ]
        loss = {row["setting"].options.get("threshold"): row["loss"] for row in own}
        where = f" ({size} pixels)" * (size != rows[0]["setting"].im_size)
        if None not in loss:
            lines.append(f"lowest threshold without loss: not known, the search ended early{where}")
            continue
        kept = [one for one in loss if one is not None and loss[one] <= loss[None] + spare]
        lines.append(f"lowest threshold without loss: {min(kept, default='none')}{where}")
    return "\n".join(lines)


def write_tuned(bench: Bench, about: Mapping[str, str], reported: Mapping[str, Row]) -> None:
    """Write `tuned.yml` into the run, and remove the exported files that no preset uses."""
    folder, presets = bench.run.folder, dict[str, Row]()
    for name, row in reported.items():
        setting = row["setting"]
        merging = bench.at(replace(setting, precision=FLOAT32)).merging
        presets[name] = {"merging": merging, "im_size": setting.im_size, "precision": setting.precision}
        if setting.precision in EXPORTED:
            presets[name]["file"] = bench.file_of(setting).relative_to(folder).as_posix()
        presets[name] |= {key: round(value, 4) for key, value in row.items() if isinstance(value, float)}
    content: dict[str, Any] = {**about, "checkpoint": checkpoint_file(bench.run.path).name}
    content |= {"weights": weights_digest(bench.run.model.state_dict()), **environment(bench.run.device)}
    content |= {"date": datetime.now().astimezone().isoformat(timespec="minutes")}
    content = json.loads(json.dumps(content | {"plain": presets.pop(PURE), "presets": presets}))  # plain types alone
    write_text(folder / TUNED, yaml.safe_dump(content, sort_keys=False))
    used = {one.get("file") for one in (content["plain"], *content["presets"].values())}
    for file in bench.memory.file.parent.glob("*.onnx"):
        if file.relative_to(folder).as_posix() not in used:
            file.unlink()


if __name__ == "__main__":
    main()
