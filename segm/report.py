"""Compare runs on one data set, all measured in one go, and show them on one web page."""

import json
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import patch
from segm.checkpoint import CHOICES
from segm.cli import COUNT, FILE, POSITIVE, WORDS, device_option, markdown
from segm.config import EXPORTED, Preset
from segm.data import DATASETS, IGNORE_LABEL, SegmentationDataset, spread
from segm.data.images import resize_to
from segm.eval.cost import compare
from segm.eval.timing import environment
from segm.merging import PluginCommand, assignment_of, parse
from segm.run import Run
from segm.runlog import read_log
from segm.sharing import find
from segm.storage import write_text
from vis import mark, page

THRESHOLD, LAYER = 0.88, 2  # where the explorer starts if no run merges
IM_SIZE = click.Option(["--im-size"], type=POSITIVE)
CHECKPOINT = click.Option(["--checkpoint"], type=click.Choice([*CHOICES]))


@click.command(cls=PluginCommand)
@click.argument("texts", metavar="RUN [RUN ...]", nargs=-1, required=True)
@click.option(
    "--dataset",
    "dataset_name",
    type=click.Choice(DATASETS),
    help="Data set of the images.  [default: that of the first run]",
)
@click.option("--cost-images", type=POSITIVE, default=20, help="Number of images for speed, operations and tokens.")
@click.option("--pictures", "n_pictures", type=COUNT, default=4, help="Number of images with label maps.")
@click.option("--explore", "n_explored", type=COUNT, default=4, help="Number of images in the explorer.")
@click.option(
    "--layer",
    type=int,
    help="Layer of the explorer, counted from 1.  [default: where graph or the first run merges, else 2]",
)
@click.option(
    "--out", type=FILE, default="report.html", help="File of the page; all numbers go into a .json next to it."
)
@device_option
@click.option(
    "--max-images",
    type=POSITIVE,
    metavar="N",
    help="Number of images for the mIoU, spread over the data set.  [default: all]",
)
@click.pass_context
def main(
    ctx: click.Context,
    texts: tuple[str, ...],
    dataset_name: str | None,
    cost_images: int,
    n_pictures: int,
    n_explored: int,
    layer: int | None,
    out: Path,
    device: torch.device,
    max_images: int | None,
) -> None:
    """Compare each RUN, a checkpoint, a run directory or "NAME=PATH [merging options]", on one web page.

    The mIoU comes from sliding windows at full size. Tokens, GFLOPs and images/s come from images resized to the crop
    size, one at a time, interleaved. The page needs no network. Its threshold explorer shows the regions that graph
    merging forms at any threshold.
    """
    check_out(out)
    runs = open_runs(texts, dataset_name, device)
    dataset, _ = runs[0].open(name=dataset_name)
    logs, explored = read_logs(runs), explore(runs, dataset, layer, n_explored)
    rows = measure(runs, dataset.name, cost_images, max_images)
    n_images = {"mean_iou": min(max_images or len(dataset), len(dataset)), "cost": len(rows[0]["counts"])}
    record = {"dataset": dataset.name, "n_images": n_images, **environment(device)}
    record |= {"command": shlex.join(["g2tm", "report", *ctx.meta[WORDS]])}
    record |= {"date": datetime.now().astimezone().isoformat(timespec="minutes")}
    pictures = picture_blocks(runs, dataset, n_pictures)
    data = read_inventories(runs)
    write_text(out, page.comparison_page(record, rows, dataset.classes, logs, pictures, explored, data))
    numbers = json.dumps(record | {"rows": rows}, indent=2, default=str)
    write_text(out.with_suffix(".json"), numbers)
    click.echo(markdown(page.COLUMNS, rows))
    click.echo(f"mIoU over {n_images['mean_iou']} images, the rest over {n_images['cost']}")
    click.echo(f"written to {out} and {out.with_suffix('.json')}")


def check_out(out: Path) -> None:
    """Raise a click.UsageError where the page could not be written in the end."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise click.UsageError(f"--out {out}: the page is HTML, give a name that ends in .html")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise click.UsageError(f"--out {out}: {folder} cannot be written to, choose another place")


def read_run(text: str) -> tuple[str | None, Path, dict[str, Any]]:
    """A RUN as the user gave it -> (name, path, its options as `segm.merging.parse` gives them).

    Raises:
        click.UsageError: neither a path nor NAME=PATH with merging options.
    """
    if Path(text).exists():
        return None, Path(text), {}
    name, equals, rest = (part.strip() for part in text.partition("="))
    if not equals:
        raise click.UsageError(f"no such file {text}: give a checkpoint, a run directory or NAME=PATH [options]")
    if not name:
        raise click.UsageError(f"{text}: give it a name, NAME=PATH")
    try:
        path, *options = shlex.split(rest)
    except ValueError as error:  # nothing after NAME=, or quotes that do not close
        raise click.UsageError(f"{text}: give NAME=PATH, and merging options after it") from error
    try:
        return name, Path(path), parse(options, IM_SIZE, CHECKPOINT)
    except ValueError as error:
        raise click.UsageError(f"{text}: {error}") from error


def open_runs(texts: Sequence[str], dataset_name: str | None, device: torch.device) -> list[Run]:
    """Load all runs and check that all can be scored on one data set.

    Args:
        texts: see `read_run`.
        dataset_name: None: that of the first run.

    Raises:
        ValueError, OSError, click.UsageError: one that cannot be loaded, or two of one name.
    """
    runs: list[Run] = []
    for text in tqdm(texts, desc="loading", unit="run", leave=False):
        name, path, given = read_run(text)
        try:
            size, path = given.pop("im_size", None), find(path, given.pop("checkpoint", None))
            is_file = "preset" in given and Preset.read(path, given["preset"]).precision in EXPORTED
            amp = False if is_file else None  # the report looks into models: merging and size of the preset alone
            run = Run.load(path, name=name, device=device, merging=given, im_size=size, amp=amp)
        except ValueError as error:
            raise ValueError(f"{name or path}: {error}") from error
        if any(run.name == other.name for other in runs):
            raise click.UsageError(f"two runs are named {run.name}: give one another name, NAME=PATH")
        dataset_name = dataset_name or run.dataset
        run.open(name=dataset_name)
        runs.append(run)
    return runs


def measure(runs: Sequence[Run], dataset_name: str, cost_images: int, max_images: int | None) -> list[dict[str, Any]]:
    """Scores and costs of the runs: costs from so many images, scores from at most so many (None: all).

    Returns:
        List of dicts: `name`, `path`, `method`, `settings`; scores in percent (`segmentation_scores`); and the
        entries of `segm.eval.cost.compare`.
    """
    references = {run.name: reference_of(run, runs) for run in runs}
    models = {run.name: run for run in runs} | {run.name: run for run in references.values()}
    views: dict[tuple[tuple[int, int], str], list[Tensor]] = {}
    for run in models.values():
        views.setdefault((run.crop_size, run.normalization), [*run.views(dataset_name, cost_images)])
    costs = compare(
        {name: run.model for name, run in models.items()},
        {name: reference.name for name, reference in references.items()},
        {name: views[run.crop_size, run.normalization] for name, run in models.items()},
        runs[0].device,
    )
    rows = []
    for run in tqdm(runs, desc="mIoU", unit="run", leave=False):
        settings = run.options | ({} if run.im_size is None else {"im_size": run.im_size})
        row = {"name": run.name, "path": str(run.path), "method": run.method, "settings": settings}
        row |= run.evaluate(dataset=dataset_name, n_images=max_images, progress=True)
        rows.append(row | costs[run.name])
    return rows


def reference_of(run: Run, runs: Sequence[Run]) -> Run:
    """The unpatched run against which a run's speed counts: the first one of the same network that is fed the same
    images; where there is none, an unpatched copy of the first such run."""
    alike = [other for other in runs if other.same_network(run)]
    unpatched = (other for other in alike if not patch.is_patched(other.model))
    return next(unpatched, None) or alike[0].unpatched(f"{alike[0].name}, unpatched")


@torch.inference_mode()
def explore(runs: Sequence[Run], dataset: SegmentationDataset, layer: int | None, n_images: int) -> dict[str, Any]:
    """The data of the threshold explorer for some images.

    Args:
        runs: shown is the first that merges with graph, or else the first that merges, or the first.
        dataset: where the images come from.
        layer: 1-based; None: where that run merges first.

    Returns:
        dict for `vis.page.comparison_page`: `name` of the run, `layer`, `threshold` and `images`.

    Raises:
        ValueError: a layer that the encoder lacks.
    """
    merging = [run for run in runs if patch.is_patched(run.model)]
    run = next((run for run in merging if run.method == "graph"), [*merging, *runs][0])
    model = run.unpatched().model
    if layer is None:
        layer = max(run.options["layers"][0], 1) if merging else min(LAYER, len(model.encoder.blocks))
    images = []
    with patch.edges(model.encoder, layer) as edges:
        for index in spread(n_images, len(dataset)):
            sample = dataset[index]
            model.grid_logits(run.preprocess_resized(sample.image))
            found = {name: values[0].cpu().numpy() for name, values in edges.items()}
            photo = resize_to(sample.photo, run.crop_size)
            image = {"name": sample.name, "photo": photo, "ratio": ratio_of(sample.photo)}
            images.append({**image, "patch_size": model.patch_size, **found})
    threshold = run.options.get("threshold")
    threshold = float(threshold) if isinstance(threshold, int | float) else THRESHOLD
    return {"name": run.name, "layer": layer, "threshold": threshold, "images": images}


def read_logs(runs: Sequence[Run]) -> dict[str, list[dict[str, Any]]]:
    """Logs of the trainings: name of a run -> entries of its `log.txt`; each run directory once.

    Epochs count from 1, and go on after those of the run that a training was fine-tuned from.
    """
    firsts: dict[Path, Run] = {}
    for run in runs:
        firsts.setdefault(run.folder.resolve() / "log.txt", run)
    logs = {}
    for file, run in firsts.items():
        if file.is_file() and file.stat().st_size:
            before = run.config.schedule.epochs_before or 0
            logs[run.name] = [entry | {"epoch": before + entry["epoch"] + 1} for entry in read_log(file)]
    return logs


def read_inventories(runs: Sequence[Run]) -> dict[str, Mapping[str, Any]]:
    """Inventories of the data that trainings recorded: name of a run -> split -> record; the same one once."""
    found: dict[str, Mapping[str, Any]] = {}
    for run in runs:
        inventory = run.config.data.inventory
        if inventory and inventory not in found.values():
            found[run.name] = inventory
    return found


@torch.inference_mode()
def picture_blocks(
    runs: Sequence[Run], dataset: SegmentationDataset, n_images: int
) -> tuple[list[tuple[str, list[tuple[page.Picture, page.Picture]]]], list[str], np.ndarray]:
    """Input and truth; for every run its tokens and its prediction; and where runs differ from the first in their
    labels: `pictures` of `vis.page.comparison_page`."""
    blocks: list[tuple[str, list[tuple[page.Picture, page.Picture]]]] = []
    seen: set[int] = set()
    for index in tqdm(spread(n_images, len(dataset)), desc="pictures", unit="image", leave=False):
        sample = dataset[index]
        photo = resize_to(sample.photo, runs[0].crop_size)
        truth = np.full(sample.image.shape[:2], IGNORE_LABEL, np.uint8) if sample.label is None else sample.label
        truth = cv2.resize(truth, photo.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        pairs = [(page.picture(photo, "input"), page.label_picture(truth, dataset.palette, "truth"))]
        seen.update(np.unique(truth))
        shown: list[np.ndarray] = []
        for run in runs:
            labels = run.model.predict(run.preprocess_resized(sample.image))[0].cpu().numpy()
            seen.update(np.unique(labels))
            predicted = page.label_picture(labels, dataset.palette, f"{run.name}: prediction")
            pairs.append((token_picture(run, sample.photo), predicted))
            shown.append(cv2.resize(labels.astype(np.uint16), photo.shape[1::-1], interpolation=cv2.INTER_NEAREST))
        for run, labels in zip(runs[1:], shown[1:], strict=True):
            pairs.append(difference_pictures(photo, shown[0], labels, dataset.palette, (runs[0].name, run.name)))
        ratio = ratio_of(sample.photo)
        blocks.append((sample.name, [(a._replace(ratio=ratio), b._replace(ratio=ratio)) for a, b in pairs]))
    classes = sorted(label for label in seen if label < dataset.n_cls)
    return blocks, [dataset.classes[i] for i in classes], np.asarray(dataset.palette)[classes]


def ratio_of(photo: np.ndarray) -> float:
    """Width ÷ height of a photograph, (H, W, ...)."""
    height, width = photo.shape[:2]
    return width / height


def difference_pictures(
    photo: np.ndarray, first: np.ndarray, second: np.ndarray, palette: np.ndarray, names: tuple[str, str]
) -> tuple[page.Picture, page.Picture]:
    """Two label maps, (H, W): the pixels that differ, marked on the photograph, and the labels of the second there."""
    differs = first != second
    caption = f"{names[1]}: other labels than {names[0]} in {100 * differs.mean():.1f} % of the pixels"
    there = page.label_picture(np.where(differs, second, len(palette)), palette, f"{names[1]}: labels that differ")
    return page.picture(mark(photo, differs), caption, lossless=True), there


def token_picture(run: Run, image: np.ndarray) -> page.Picture:
    """The tokens of the last pass, which was over this image, with their number."""
    photo = resize_to(image, run.crop_size)
    grid = run.model.grid(run.crop_size)
    n_all = math.prod(grid)
    reduction = patch.reduction(run.model) if patch.is_patched(run.model) else None
    assignment = np.arange(n_all) if reduction is None else assignment_of(reduction)
    count = n_all if reduction is None else reduction.counts.item()
    caption = f"{run.name}: {count} of {n_all} tokens"
    return page.token_picture(photo, assignment, grid, run.model.patch_size, caption)


if __name__ == "__main__":
    main()
