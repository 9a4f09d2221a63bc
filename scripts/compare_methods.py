"""All methods at the same operations: applied without training, and after a short one.

python scripts/compare_methods.py runs/plain shapes --share 0.75 --share 0.6 --epochs 2 --work runs/compared
"""

import copy
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from equal_cost import FIXED, FLAGS, KNOBS, NEEDS_TRAINING, gflops, options_for
from results_file import append, out_option
from tqdm import tqdm
from trainings import train_unless_finished

import patch
from segm.cli import POSITIVE, Command, dataset_argument, device_option, markdown
from segm.eval.cost import compare
from segm.merging import PURE, apply, mean_tokens
from segm.run import Run
from segm.storage import write_text

SMALLER, COARSER = "smaller image", "coarser patch"
BASELINES = (SMALLER, COARSER)  # what does without merging
COLUMNS = {
    "method": "{method}",
    "setting": "{setting}",
    "GFLOPs": "{gflops:.3f}",
    "images/s": "{images_per_second:.1f}",
    "applied": "{applied}",
    "trained": "{trained}",
}


@click.command(cls=Command)
@click.argument("plain", type=click.Path(exists=True, path_type=Path))
@dataset_argument
@click.option("--share", "shares", type=click.FloatRange(0, 1), multiple=True, default=(0.75, 0.6), show_default=True)
@click.option("--methods", help="Comma-separated.  [default: all, random merging and the baselines]")
@click.option("--epochs", type=click.IntRange(min=0), default=1, show_default=True, help="Of training; 0: none.")
@click.option("--train-options", default="", help="Further options of train.py, quoted.")
@click.option("--cost-images", type=POSITIVE, default=8, show_default=True, help="Images for operations and speed.")
@click.option("--max-images", type=POSITIVE, help="Images for the mIoU.")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Folder of trainings, and of rows.json.",
)
@out_option
@device_option
def main(
    plain: Path,
    dataset_name: str,
    shares: tuple[float, ...],
    methods: str | None,
    epochs: int,
    train_options: str,
    cost_images: int,
    max_images: int | None,
    work: Path,
    out: Path,
    device: torch.device,
) -> None:
    """Compare all methods at the same share of the operations of PLAIN, a run without merging, on DATASET.

    Every method is set so that a pass takes that share of the plain one's GFLOPs, is scored without training and after
    one that starts from PLAIN, and is timed, all interleaved. Known measurements are not repeated.
    """
    run = Run.load(plain, device=device, patch_type=PURE)
    kept = work / "rows.json"
    known = json.loads(kept.read_text()) if kept.exists() else []
    done = {(row["method"], row["share"]): row for row in known}
    every = (*KNOBS, *FIXED, *BASELINES)
    names = methods.split(",") if methods else every
    if unknown := set(names) - {*every}:
        raise click.BadParameter(f"{', '.join(sorted(unknown))}: choose from {', '.join(every)}")
    views = [*run.views(dataset_name, cost_images)]
    whole = gflops(run.model, views)
    pure = run.evaluate(dataset=dataset_name, n_images=max_images)["mean_iou"]
    rows = [done.get((PURE, 1.0)) or {"method": PURE, "share": 1.0, "options": {}, "gflops": whole, "applied": pure}]
    for share in shares:
        for name in tqdm(names, f"{share:g} of the operations", unit="method"):
            if name in FIXED and share != shares[0]:
                continue
            row = done.get((name, share)) or {"method": name, "share": share}
            row = fill(row, run, views, whole, dataset_name, max_images)
            rows.append(row)
            if epochs and name != SMALLER and "trained" not in row:
                folder = work / f"{name}_{share:g}"
                train(folder, plain, name, row["options"], epochs, train_options, dataset_name, device)
                row["trained"] = Run.load(folder, device=device).evaluate(dataset=dataset_name, n_images=max_images)[
                    "mean_iou"
                ]
            write_text(kept, json.dumps(rows, indent=2, default=str) + "\n")
    time_all(rows, run, views, dataset_name, cost_images)
    append("methods", "operations", rows, device, out, plain=str(plain), dataset=dataset_name, epochs=epochs)
    click.echo(markdown(COLUMNS, [shown(row) for row in rows]))


def fill(
    row: dict[str, Any], run: Run, views: list, whole: float, dataset: str, max_images: int | None
) -> dict[str, Any]:
    """Set a method to its share of the operations, and score it as it is."""
    if "gflops" in row:
        return row
    if row["method"] == SMALLER:
        return row | fill_smaller(run, row["share"] * whole, dataset, max_images, len(views))
    if row["method"] == COARSER:
        return row | fill_coarser(run, row["share"] * whole, dataset, max_images, views)
    model = with_parts(run.model, row["method"])
    options = options_for(model, row["method"], views, row["share"] * whole, gflops)
    merged = apply(model, row["method"], options)
    row |= {"options": options, "gflops": gflops(merged, views), "tokens": mean_tokens(merged, views)}
    if row["method"] not in NEEDS_TRAINING:
        own = Run(row["method"], run.path, merged, run.config, run.device, run.precision)
        row["applied"] = own.evaluate(dataset=dataset, n_images=max_images)["mean_iou"]
    return row


def with_parts(model: Any, method: str) -> Any:
    """A copy of a model, with the learned parts that a method cannot do without."""
    model, entry = copy.deepcopy(model), patch.find(method)
    if entry.modules is not None and entry.enabled_by is None:
        patch.add_modules(model.encoder, method)
    return model


def fill_smaller(run: Run, wanted: float, dataset: str, max_images: int | None, n_views: int) -> dict[str, Any]:
    """The plain model at the image size whose crops cost the next most."""
    side, whole, own = run.model.patch_size[0], run.crop_size[0], []
    for crop in range(side, whole + 1, side):
        size = round(run.image_size * crop / whole)
        small = Run(run.name, run.path, run.model, run.config, run.device, run.precision, size)
        own.append((abs(gflops(run.model, [*small.views(dataset, 1)]) - wanted), size, small))
    _, size, small = min(own, key=lambda one: one[0])
    views = [*small.views(dataset, n_views)]
    found = {"options": {"im_size": size}, "gflops": gflops(run.model, views), "tokens": mean_tokens(run.model, views)}
    return found | {"applied": small.evaluate(dataset=dataset, n_images=max_images)["mean_iou"]}


def fill_coarser(run: Run, wanted: float, dataset: str, max_images: int | None, views: list) -> dict[str, Any]:
    """The plain model with the patch size that costs the next most, its patch embedding resampled."""
    own = run.model.patch_size[0]
    costs = {
        size: gflops(run.with_settings(PURE, {}, None, size).model, views[:1]) for size in range(own + 1, 2 * own + 1)
    }
    size = min(costs, key=lambda one: abs(costs[one] - wanted))
    one = run.with_settings(PURE, {}, None, size)
    found = {"options": {"patch_size": size}, "gflops": costs[size], "tokens": mean_tokens(one.model, views)}
    return found | {"applied": one.evaluate(dataset=dataset, n_images=max_images)["mean_iou"]}


def train(
    folder: Path,
    plain: Path,
    method: str,
    options: Mapping[str, Any],
    epochs: int,
    more: str,
    dataset: str,
    device: torch.device,
) -> None:
    """Train a method for so many epochs, from the plain run."""
    words = ["--finetune", str(plain), "--dataset", dataset, "--patch-type", PURE if method == COARSER else method]
    words += ["--epochs", str(epochs), "--eval-freq", str(epochs), *shlex.split(more)]
    words += [word for name, value in options.items() for word in (FLAGS[name], str(value))]
    train_unless_finished(folder, words, ["--device", str(device)])


def time_all(rows: list[dict[str, Any]], run: Run, views: list, dataset: str, n_images: int) -> None:
    """Images/s of every row, all interleaved."""
    models, batches = {}, {}
    for index, row in enumerate(rows):
        models[str(index)] = model_of(row, run)
        size = row["options"].get("im_size")
        own = Run(run.name, run.path, run.model, run.config, run.device, run.precision, size)
        batches[str(index)] = [*own.views(dataset, n_images)]
    found = compare(models, dict.fromkeys(models, "0"), batches, run.device)
    for index, row in enumerate(rows):
        row["images_per_second"] = found[str(index)]["images_per_second_scores"]


def model_of(row: dict[str, Any], run: Run) -> Any:
    """The model of a row, as it is applied."""
    if row["method"] in (PURE, SMALLER):
        return run.model
    if row["method"] == COARSER:
        return run.with_settings(PURE, {}, None, row["options"]["patch_size"]).model
    return apply(with_parts(run.model, row["method"]), row["method"], row["options"])


def shown(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the table shows it."""
    options = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row["options"].items()}
    texts = {key: f"{row[key]:.2f}" if key in row else "-" for key in ("applied", "trained")}
    return {**row, **texts, "setting": ", ".join(f"{key} {value}" for key, value in options.items())}


if __name__ == "__main__":
    main()
