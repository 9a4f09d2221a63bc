"""Compare runs on one data set, all measured in one go, and show them on one web page."""

import json
import math
import os
import shlex
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import click
import cv2
import numpy as np
import torch
from tqdm import tqdm

import patch
from segm.checkpoint import checkpoint_file
from segm.data import DATASETS, IGNORE_LABEL
from segm.eval.environment import environment
from segm.eval.evaluate import evaluate
from segm.eval.operations import count_operations
from segm.eval.runs import SquareViews, open_evaluation, run_normalization, square_view, trained_on
from segm.eval.timing import interleaved_rates
from segm.metrics import segmentation_scores
from segm.model.factory import load_model
from segm.model.segmenter import Segmenter
from segm.options import Command, device_option, load_patched, max_images_option, read_merging_options
from segm.token_stats import count_tokens
from vis import page

THRESHOLD, LAYER = 0.88, 2  # where the explorer starts if no run merges


class Run(NamedTuple):
    """name: in tables and plots; path: checkpoint or run directory; variant: its `variant.yml`; dataset, windows: with
    which it is evaluated."""

    name: str
    path: Path
    model: Segmenter
    variant: dict
    dataset: Any
    windows: Any

    @property
    def view_key(self):
        """Runs of the same key are fed the same images."""
        return self.variant["dataset_kwargs"]["crop_size"], run_normalization(self.variant)


class RecordedCommand(Command):
    """Keeps its arguments as they were given."""

    def parse_args(self, ctx, args):
        ctx.meta["report.command"] = shlex.join(["python", "segm/report.py", *args])
        return super().parse_args(ctx, args)


@click.command(cls=RecordedCommand)
@click.argument("texts", metavar="RUN [RUN ...]", nargs=-1, required=True)
@click.option("--dataset", "dataset_name", type=click.Choice(DATASETS), help="[default: that of the first run]")
@click.option("--cost-images", type=click.IntRange(min=1), default=20, show_default=True, help="For all but the mIoU.")
@click.option(
    "--pictures", "n_pictures", type=click.IntRange(min=0), default=4, show_default=True, help="Images shown."
)
@click.option(
    "--explore", "n_explored", type=click.IntRange(min=0), default=4, show_default=True, help="Images in the explorer."
)
@click.option(
    "--layer",
    type=int,
    help="Of the explorer, counted from 1.  [default: where graph merges, or the first run that does, else 2]",
)
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    default="report.html",
    show_default=True,
    help="The page; all numbers go into a .json beside it.",
)
@device_option
@max_images_option
@click.pass_context
def main(ctx, texts, dataset_name, cost_images, n_pictures, n_explored, layer, out, device, max_images):
    """Compare each RUN, a checkpoint, a run directory or "NAME=PATH [merging options]", on one web page.

    mIoU comes from sliding windows at full size (--max-images: of the first images). Everything else comes from images
    resized to crop x crop, one at a time: tokens, GFLOPs and images/s are measured interleaved. The page needs no
    network. On it a threshold explorer shows what graph merging would do at any threshold.
    """
    check_out(out)
    runs = open_runs(texts, dataset_name, device)
    logs, explored = read_logs(runs), explore(runs, layer, n_explored, device)
    rows = measure(runs, cost_images, max_images, device)
    name = dataset_name or trained_on(runs[0].variant)
    n_images = {
        "mean_iou": min(max_images or len(runs[0].dataset), len(runs[0].dataset)),
        "cost": len(rows[0]["counts"]),
    }
    record = {"dataset": name, "n_images": n_images, **environment(device), "command": ctx.meta["report.command"]}
    record["date"] = datetime.now().astimezone().isoformat(timespec="minutes")
    html = compose(runs, rows, record, logs, explored, n_pictures, device)
    out.parent.mkdir(parents=True, exist_ok=True)
    write(out, html)
    write(out.with_suffix(".json"), json.dumps(record | {"rows": _without_nan(rows)}, indent=2, default=str))
    click.echo(page.markdown_table(rows))
    click.echo(f"written to {out} and {out.with_suffix('.json')}")


def check_out(out):
    """Raise a click.UsageError where the page could not be written in the end."""
    if out.suffix.lower() not in (".html", ".htm"):
        raise click.UsageError(f"--out {out}: the page is HTML, give a name that ends in .html")
    folder = next(parent for parent in out.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise click.UsageError(f"--out {out}: {folder} cannot be written to, choose another place")


def read_run(text):
    """A RUN as the user gave it -> (name, path, values of the merging options).

    Raises:
        click.UsageError: neither a path nor NAME=PATH with merging options.
    """
    if Path(text).exists():
        return checkpoint_file(text).resolve().parent.name, Path(text), {}
    name, equals, rest = (part.strip() for part in text.partition("="))
    if not equals:
        raise click.UsageError(f"no such file {text}: give a checkpoint, a run directory or NAME=PATH [options]")
    try:
        path, *options = shlex.split(rest)
        given = read_merging_options(options)
    except click.UsageError as error:
        raise click.UsageError(f"{text}: {error.format_message()}") from error
    except ValueError as error:  # nothing behind NAME=, or quotes that do not close
        raise click.UsageError(f"{text}: give NAME=PATH, and merging options behind it") from error
    if not name:
        raise click.UsageError(f"{text}: give it a name, NAME=PATH")
    return name, Path(path), given


def open_runs(texts, dataset_name, device):
    """Load all runs, on one data set.

    Args:
        texts: see `read_run`.
        dataset_name: None: that of the first run.

    Returns:
        List of `Run`.

    Raises:
        ValueError, OSError, click.UsageError: one that cannot be loaded, or two of one name.
    """
    read = [read_run(text) for text in texts]
    names = [name for name, _, _ in read]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise click.UsageError(f"two runs are named {twice}: give one another name, NAME=PATH")
    runs = []
    for name, path, given in tqdm(read, desc="loading", unit="run", leave=False):
        try:
            model, variant = load_patched(path, given, device)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        dataset_name = dataset_name or trained_on(variant)
        runs.append(Run(name, path, model, variant, *open_evaluation(variant, dataset_name)))
    return runs


def measure(runs, cost_images, max_images, device):
    """One dict per run: what it scores and what it costs.

    Args:
        runs: list of `Run`.
        cost_images: images for tokens, operations and speed.
        max_images: images for the mIoU; None: all.

    Returns:
        List of dicts: `name`, `path`, `method`, `settings`; scores in percent (`mean_iou`, `pixel_accuracy`,
        `mean_accuracy`, `per_class_iou`); means over images of `tokens` (of `n_patches`) and of 10⁹ operations, one
        per multiply-add (`gflops`, `gflops_encoder`, `gflops_decoder`); medians over images of images/s at batch 1
        (`images_per_second` of `predict`, `images_per_second_scores` of token scores) and of `realised_share`
        (of `reference`, an unpatched run or an unpatched copy); `counts`, the tokens of every image.
    """
    views = {}
    for run in runs:
        if run.view_key not in views:
            views[run.view_key] = list(SquareViews(run.dataset, run.variant, cost_images, device=device))
    references = {run.name: reference_of(run, runs) for run in runs}
    extra = {run.name: _unpatched(run, device) for run in runs if _copy_name(run) in references.values()}
    rates = _rates(runs, extra, views, device)
    costs = {}
    for run in tqdm([*runs, *extra.values()], desc="operations", unit="run", leave=False):
        costs[run.name] = _costs(run.model, views[run.view_key])
    rows = []
    for run in tqdm(runs, desc="mIoU", unit="run", leave=False):
        confusion = evaluate(run.model, run.dataset, run.windows, device=device, n_images=max_images, progress=True)
        merged = patch.is_patched(run.model)
        row = {"name": run.name, "path": str(run.path), "method": patch.method(run.model) if merged else "pure"}
        row |= {"settings": patch.settings(run.model) if merged else {}, **segmentation_scores(confusion)}
        row |= _row_of_costs(run.name, references[run.name], costs, rates)
        rows.append(row | {"n_patches": math.prod(grid_of(run.model, views[run.view_key][0]))})
    return rows


def reference_of(run, runs):
    """Name of the unpatched model against which a run's speed counts: the first unpatched run of the same architecture
    that is fed the same images; where there is none, a name for an unpatched copy of the first such run."""
    alike = [
        other
        for other in runs
        if other.variant["net_kwargs"] == run.variant["net_kwargs"] and other.view_key == run.view_key
    ]
    unpatched = (other.name for other in alike if not patch.is_patched(other.model))
    return next(unpatched, _copy_name(alike[0]))


def _copy_name(run):
    return f"{run.name}, unpatched"


def _unpatched(run, device):
    """The same run without merging, under the name of `reference_of`."""
    return run._replace(name=_copy_name(run), model=load_model(run.path)[0].to(device))


def _rates(runs, extra, views, device):
    """(name, "labels" or "scores") -> (images,) images/s at batch 1, all timed interleaved."""

    def on_view(function, key):
        return lambda batch: function(views[key][batch[0]])  # a batch is the number of one image

    calls = {(run.name, "labels"): on_view(run.model.predict, run.view_key) for run in runs}
    calls |= {(run.name, "scores"): on_view(run.model.grid_scores, run.view_key) for run in [*runs, *extra.values()]}
    n_images = min(map(len, views.values()))
    return interleaved_rates(calls, [[index] for index in range(n_images)], device, progress=True)


def _costs(model, views):
    """Tokens and operations of every image: dict of (images,) tensors, float64."""
    views = views if patch.is_patched(model) else views[:1]  # without merging all images cost the same
    operations = [count_operations(model, view) for view in views]
    costs = {part: [getattr(each, part) for each in operations] for part in ("total", "encoder", "decoder")}
    costs["tokens"] = [count_tokens(model, view).item() for view in views]
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in costs.items()}


def _row_of_costs(name, reference, costs, rates):
    own, pure, labels = costs[name], costs[reference], rates[name, "labels"]
    share = realised_share(
        rates[name, "scores"],
        rates[reference, "scores"],
        own["encoder"] + own["decoder"],
        pure["encoder"] + pure["decoder"],
    )
    return {
        "tokens": own["tokens"].mean().item(),
        "gflops": own["total"].mean().item(),
        "gflops_encoder": own["encoder"].mean().item(),
        "gflops_decoder": own["decoder"].mean().item(),
        "images_per_second": labels.quantile(0.5).item(),
        "images_per_second_scores": rates[name, "scores"].quantile(0.5).item(),
        "realised_share": share,
        "reference": reference,
        "counts": own["tokens"].long().expand(len(labels)).tolist(),
    }


def realised_share(rates, pure_rates, operations, pure_operations):
    """(speed merged ÷ speed pure) ÷ (operations pure ÷ operations merged), the median over images.

    1 means that every operation saved became time saved.

    Args:
        rates, pure_rates: (images,), images/s of the same images.
        operations, pure_operations: (images,), or (1,) where all images cost the same.
    """
    return ((rates / pure_rates) / (pure_operations / operations)).quantile(0.5).item()


def grid_of(model, view):
    """(gh, gw), patches of images (B, 3, H, W)."""
    return tuple(-(-side // size) for side, size in zip(view.shape[-2:], model.patch_size, strict=True))


@torch.inference_mode()
def explore(runs, layer, n_images, device):
    """What the threshold explorer needs of some images.

    Args:
        runs: list of `Run`; shown is the first that merges with graph, or else the first that merges, or the first.
        layer: 1-based; None: where that run merges first.

    Returns:
        dict for `vis.page.explorer_section`: `name` of the run, `layer`, `threshold` and `images`.

    Raises:
        ValueError: a layer that the encoder lacks.
    """
    merging = [run for run in runs if patch.is_patched(run.model)]
    run = next((run for run in merging if patch.method(run.model) == "graph"), [*merging, *runs][0])
    settings = patch.settings(run.model) if merging else {}
    model = load_model(run.path)[0].to(device)
    if layer is None:
        layer = settings["layers"][0] if settings else min(LAYER, len(model.encoder.blocks))
    images = []
    with patch.edges(model.encoder, layer) as edges:
        for index in range(min(n_images, len(run.dataset))):
            sample = run.dataset[index]
            photo, view = square(run, sample.image, device)
            model.grid_scores(view)
            found = {name: values[0].cpu().numpy() for name, values in edges.items()}
            images.append({"name": sample.name, "photo": photo, "patch_size": model.patch_size, **found})
    threshold = settings.get("threshold")
    threshold = float(threshold) if isinstance(threshold, int | float) else THRESHOLD
    return {"name": run.name, "layer": layer, "threshold": threshold, "images": images}


def square(run, image, device):
    """A photograph resized to crop × crop, and the model's view of it, (1, 3, crop, crop)."""
    side, normalization = run.view_key
    photo = cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)
    return photo, square_view(image, side, normalization).to(device)


def compose(runs, rows, record, logs, explored, n_pictures, device):
    """The page.

    Args:
        runs, rows: see `measure`.
        record: `dataset`, `n_images`, device, versions, command and date.
        logs: from `read_logs`.
        explored: from `explore`.
        n_pictures: images that are shown.
    """
    counts = f"{record['n_images']['mean_iou']} images for the mIoU, {record['n_images']['cost']} for the rest"
    versions = f"Python {record['python']}, PyTorch {record['torch']}, timm {record['timm']}"
    facts = [("data set", f"{record['dataset']}, {counts}"), ("device", record["device"]), ("versions", versions)]
    facts += [("date", record["date"]), ("command", record["command"])]
    sections = [
        page.methods_section(rows),
        page.trade_off_section(rows),
        page.classes_section(rows, runs[0].dataset.classes),
        page.training_section(logs, [run.name for run in runs]),
        page.tokens_section(rows),
        page.pictures_section(*picture_blocks(runs, n_pictures, device)),
        page.explorer_section(**explored),
    ]
    return page.page(f"Token reduction on {record['dataset']}", facts, filter(None, sections))


def read_logs(runs):
    """What the trainings wrote down: name of a run -> entries of its `log.txt`; each run directory once.

    Raises:
        ValueError: a file that holds something else than a JSON object per line.
    """
    files = {}
    for run in runs:
        files.setdefault(checkpoint_file(run.path).resolve().parent / "log.txt", run.name)
    return {name: read_log(file) for file, name in files.items() if file.is_file() and file.stat().st_size}


def read_log(file):
    """Entries of one `log.txt`."""
    try:
        entries = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f"{file} is damaged: it should hold a JSON object per line ({error})") from error
    return [entry for entry in entries if isinstance(entry, dict) and "epoch" in entry]


@torch.inference_mode()
def picture_blocks(runs, n_images, device):
    """Input and truth, and for every run its tokens and its prediction.

    Returns:
        (list of HTML, one per image; names and palette (C, 3) of the classes that occur).
    """
    dataset, blocks, seen = runs[0].dataset, [], set()
    for index in tqdm(range(min(n_images, len(dataset))), desc="pictures", unit="image", leave=False):
        sample = dataset[index]
        photo, _ = square(runs[0], sample.image, device)
        truth = np.full(sample.image.shape[:2], IGNORE_LABEL, np.uint8) if sample.label is None else sample.label
        truth = cv2.resize(truth, photo.shape[1::-1], interpolation=cv2.INTER_NEAREST)
        pairs = [(page.picture(photo, "input"), page.label_picture(truth, dataset.palette, "truth"))]
        seen.update(np.unique(truth))
        for run in runs:
            photo, view = square(run, sample.image, device)
            labels = run.model.predict(view)[0].cpu().numpy()
            seen.update(np.unique(labels))
            predicted = page.label_picture(labels, dataset.palette, f"{run.name}: prediction")
            pairs.append((token_picture(run, photo, view), predicted))
        blocks.append(page.picture_pairs(sample.name, pairs))
    classes = sorted(label for label in seen if label < dataset.n_cls)
    return blocks, [dataset.classes[i] for i in classes], np.asarray(dataset.palette)[classes]


def token_picture(run, photo, view):
    """HTML of the tokens of the last pass, with their number."""
    size, grid = run.model.patch_size, grid_of(run.model, view)
    n_all = math.prod(grid)
    reduction = patch.reduction(run.model) if patch.is_patched(run.model) else None
    count = n_all if reduction is None else reduction.counts.item()
    caption = f"{run.name}: {count} of {n_all} tokens"
    if reduction is None:
        return page.token_picture(photo, np.arange(n_all), grid, size, caption)
    if reduction.assignment is None:  # its tokens are no groups of patches
        return page.picture(photo, caption)
    return page.token_picture(photo, reduction.assignment[0].cpu().numpy(), grid, size, caption)


def write(file, text):
    """Write a text in one step."""
    partial = file.with_name(file.name + ".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def _without_nan(rows):
    """JSON knows no NaN: None instead."""

    def plain(value):
        if isinstance(value, list):
            return [plain(each) for each in value]
        return None if isinstance(value, float) and math.isnan(value) else value

    return [{key: plain(value) for key, value in row.items()} for row in rows]


if __name__ == "__main__":
    main()
