"""Costs and gains of merging on a real model, DINOv2 ViT-S/14 on CamVid; measures most of RESULTS.md.

DATASET=… python scripts/real_results.py --weights dinov2_vits14.safetensors --work runs/real
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from equal_cost import FIXED, FLAGS, KNOBS, NEEDS_TRAINING, options_for
from real_classification import classify
from real_speed import PHOTOS, in_every_precision, measure_speed
from real_tokens import kept_share, purity, region_sheet, similarities
from results_file import PICTURES, append, out_option
from tables import over_seeds
from tqdm import tqdm
from tradeoff import Row, Setting, Tradeoff
from trainings import train_unless_finished

import patch
from patch.exporting import OPSET
from segm.auto_threshold import automatic_thresholds
from segm.cli import Command, Listed, device_option, markdown
from segm.data import spread
from segm.eval.timing import environment
from segm.export_onnx import COLUMNS, Export, compare, in_pytorch
from segm.exported import RUNTIMES
from segm.merging import PURE, mean_tokens
from segm.run import Run
from segm.storage import write_picture, write_text
from vis import hull, similarity_histograms, tradeoff_plot

DATASET = "camvid"
SMALL = ("pole", "sign-symbol", "pedestrian", "bicyclist")  # thin or small on the images
SPLITS = ("val", "test")
SEEDS = (0, 1, 2)
FROZEN = ["--config", "dinov2_camvid_frozen"]
WHOLE = ["--crop-size", "336", "448", "--epochs", "1", "--eval-freq", "1", "--warmup-epochs", "0"]  # the last epoch
WHOLE += ["--learning-rate", "0.0001"]
SLOW = ["--learning-rate", "0.001", "--minlearning-rate", "0.00001"]
TRAININGS = {
    "frozen_0": [*FROZEN, "--seed", "0"],
    "crops": ["--config", "dinov2_camvid_tuned", "--finetune", "{work}/frozen_0"],
    "tuned": ["--config", "dinov2_camvid_tuned", "--finetune", "{work}/crops", *WHOLE],
    "mask_transformer": [*FROZEN, "--decoder", "mask_transformer", *SLOW],
    **{f"frozen_{seed}": [*FROZEN, "--seed", str(seed)] for seed in SEEDS[1:]},
}
FROZEN_RUN = "frozen_0"
BEST = "tuned"  # on which merging is measured
SHARES = (0.9, 0.75, 0.6, 0.45, 0.3)  # of the tokens that are left at the end
NO_TRAINING = tuple(name for name in KNOBS if name not in NEEDS_TRAINING)
SIZES = (224, 280, 336, 392, 448, 504)  # shorter side, pixels
FRONTIER: dict[str, tuple[float, ...]] = {
    "graph": (0.75, 0.6),
    "algm": (0.75, 0.6),
    "tome": (0.5, 0.3),
    "expedit": (0.5, 0.35),
}
FRONTIER |= {"keymatch": (0.7, 0.6, 0.5, 0.4, 0.3)}
OWN_OPTIONS = {"expedit": {"temperature": 10.0}}  # best of 0.02 (published), 1, 10, 30, 100 on these features
EQUAL = {"keymatch": (0.6, 0.5)}  # of the frontier, what is timed in every precision, too
VIEWS, NEAR = 4, 0.01  # images that settings are found with; how far their tokens may be off, share
COST_IMAGES = 4
N_SIMILAR, N_PICTURES = 20, 6  # images for similarities and groups; drawn
THRESHOLDS = (0.95, 0.9, 0.85, 0.8, 0.7)
FASTER = {"graph": 0.6, "keymatch": 0.5}  # method -> share of the tokens, for the whole way
DEPLOYED = {"keymatch": 0.5}  # method -> budget, which fixes all shapes
ABLATED_AT = 0.6  # share of the tokens
ABLATIONS: dict[str, list[dict[str, Any]]] = {
    "graph": [
        *({"layers": [layer]} for layer in (1, 2, 3, 4, 6, 8)),
        *({"attention": mode} for mode in ("proportional", "inverse")),
    ],
    "algm": [
        *({"layers": [1, layer]} for layer in (3, 4, 5, 6, 7, 8)),
        *({"layers": layers} for layers in ([2, 6], [3, 7], [4, 8])),
        *({"attention": mode} for mode in ("proportional", "inverse")),
    ],
    "tome": [{"attention": mode} for mode in ("proportional", "none", "inverse")],
}
AUTO_LAYERS = [1, 2, 3, 4]
TRAINED = {"graph": 0.6, "keymatch": 0.5}  # method -> share of the tokens
SEEDED = (PURE, "graph", "keymatch")  # everything trained with all seeds, of others with the first
LONGER = ["--config", "dinov2_camvid_tuned", *WHOLE]
DECODER_ALONE = [*LONGER, "--freeze-encoder", "--encoder-lr-mult", "1", "--layer-decay", "1"]
ON_TUNED = ["--config", "dinov2_camvid_tuned", *WHOLE, "--epochs", "4", "--eval-freq", "4"]
NEW_HEAD = [*ON_TUNED, "--pretrained", f"{{work}}/{BEST}/checkpoint_best.pth", "--freeze-encoder"]
NEW_HEAD += ["--encoder-lr-mult", "1", "--layer-decay", "1", "--learning-rate", "0.001"]
# What changes the encoder, too, trains on crops first, as the model itself.
ON_CROPS = ["--config", "dinov2_camvid_tuned", "--epochs", "4", "--eval-freq", "4"]
CROPS_FIRST = {
    "clustvit": [*ON_CROPS, "--finetune", f"{{work}}/{BEST}", "--patch-type", "clustvit"],
    "eomt": [*ON_CROPS, "--pretrained", f"{{work}}/{BEST}/checkpoint_best.pth", "--decoder", "eomt"],
}
HEADS = {
    "mask": [*NEW_HEAD, "--decoder", "mask_transformer", "--epochs", "2", "--eval-freq", "2"],
    "linear_bn": [*NEW_HEAD, "--decoder", "linear_bn"],
    "setr_pup": [*NEW_HEAD, "--decoder", "setr_pup", "--epochs", "2", "--eval-freq", "2"],  # ten times as slow to train
    "clustvit": [*LONGER, "--finetune", "{work}/clustvit_crops"],
    "eomt": [*LONGER, "--finetune", "{work}/eomt_crops", "--decoder", "eomt"],
}
STAGES = {
    "applied": "applied: mIoU (small classes)",
    "decoder": "decoder trained",
    "everything": "everything trained",
}
CLASSIFIED = (0.75, 0.5)  # shares of the tokens that are left
PURE_AT, PURE_OF = 0.6, ("graph", "algm", "tome")  # share of the tokens, methods


@dataclass(frozen=True)
class Real:
    """The settings that all steps share.

    Attributes:
        work: folder of trainings, features, tables, and what was measured so far.
        out: folder of results.
        weights: of the backbone, or None: timm's.
        device: where to compute.
        max_images: images for the scores; None: all.
        amp: whether trainings compute in bfloat16.
    """

    work: Path
    out: Path
    weights: Path | None
    device: torch.device
    max_images: int | None = None
    amp: bool = False

    def run(self, name: str) -> Run:
        """A finished training.

        Raises:
            FileNotFoundError: it has not run.
        """
        file = self.work / name / "checkpoint_best.pth"
        if not file.exists():
            raise FileNotFoundError(f"no {file}: train it first (--steps models), or give another folder (--work)")
        return Run.load(file, device=self.device, name=name, amp=False)

    def tradeoff(self, name: str, run: Run) -> Tradeoff:
        """The measurements of a table and their file."""
        conditions = self.conditions(run) | environment(self.device)
        file = self.work / "measured" / f"{name}.json"
        return Tradeoff(run, DATASET, file, conditions, COST_IMAGES, self.max_images, boundary=True)

    def conditions(self, run: Run) -> dict[str, Any]:
        """The conditions of a run's scores."""
        return {"run": run.name, "images": self.max_images, "classes": list(SMALL)}

    def append(self, question: str, study: str, rows: Sequence[Row], **conditions: Any) -> None:
        """Add rows to the results."""
        append(question, study, rows, self.device, self.out, **conditions)

    def draw(self, name: str, picture: np.ndarray) -> None:
        """Write a picture of the results."""
        write_picture(self.out / PICTURES / f"{name}.png", picture)


# ---------------------------------------------------------------------------------------------- the models


def models(real: Real) -> str:
    """Train the plain models, and score them on the images that they were chosen by and on the others."""
    rows = []
    for name, options in tqdm(TRAININGS.items(), desc="models", unit="run", leave=False):
        train(real, name, options)
        run = real.run(name)
        scores = {split: small_and_all(run, run.evaluate(split, n_images=real.max_images)) for split in SPLITS}
        log = [json.loads(line) for line in (real.work / name / "log.txt").read_text().splitlines()]
        rows.append({"name": name, "epochs": len(log), "options": options, **scores})
    real.append("quality", "models", rows)
    columns = {
        "model": "{name}",
        "epochs": "{epochs}",
        **{f"mIoU, {split}": f"{{{split}[mean_iou]:.2f}}" for split in SPLITS},
        "small classes, val": "{val[small_iou]:.2f}",
    }
    return markdown(columns, rows)


def train(real: Real, name: str, options: Sequence[str]) -> None:
    """Train with the real command, unless it is done; an interrupted training goes on."""
    own = [option.format(work=real.work) for option in options] + ["--amp"] * real.amp
    if "--config" in own and not {"--finetune", "--pretrained"} & {*own} and real.weights is not None:
        own += ["--pretrained", str(real.weights)]
    always = ["--device", str(real.device), "--feature-folder", str(real.work / "features")]
    train_unless_finished(real.work / name, own, always)


def small_and_all(run: Run, scores: Row) -> Row:
    """Scores with the mean IoU of the small classes."""
    known = dict(zip(run.classes, scores["per_class_iou"], strict=True))
    own = [known[name] for name in SMALL if known[name] is not None]
    return scores | {"small_iou": round(sum(own) / len(own), 2) if own else math.nan}


# ---------------------------------------------------------------------------------------------- every method


def methods(real: Real) -> str:
    """Every method at five numbers of tokens, without training, and smaller images and coarser patches."""
    run = real.run(BEST)
    views = [*run.views(DATASET, VIEWS)]
    settings = {Setting(): (PURE, 1.0)}
    for name in tqdm(NO_TRAINING, desc="settings", unit="method", leave=False):
        for share in SHARES:
            settings[at_share(run, name, share, views)] = name, share
    settings |= {Setting(name): (name, 0.0) for name in FIXED if name not in NEEDS_TRAINING}
    settings |= smaller_and_coarser(run)
    rows = measured(real, "methods", "methods", run, settings)
    for name, over_tokens in (("methods_time", False), ("methods_tokens", True)):
        real.draw(name, tradeoff_plot(rows, [row["label"] for row in rows], tokens=over_tokens))
    return "\n\n".join(by_share(rows, text, title) for title, text in CELLS.items())


def at_share(run: Run, method: str, share: float, views: list, im_size: int | None = None, **fixed: Any) -> Setting:
    """The setting of a method that leaves a share of the tokens at the end; fixed: its other options."""
    n_patches = math.prod(run.model.grid(views[0].shape[-2:]))
    return Setting(method, options_for(run.model, method, views, share * n_patches, near=NEAR, **fixed), im_size)


def smaller_and_coarser(run: Run) -> dict[Setting, tuple[str, float]]:
    """Smaller images and coarser patches with about as many patches as the methods leave."""
    (height, width), side = run.crop_size, run.model.patch_size[0]
    found: dict[Setting, tuple[str, float]] = {}
    for share in SHARES:
        rows = round((height / side) * share**0.5)
        found[Setting(im_size=run.image_size * rows * side // height)] = "smaller image", share
        size = min(
            range(side + 1, 4 * side),
            key=lambda one: abs(-(-height // one) * -(-width // one) - share * (height // side) * (width // side)),
        )
        found[Setting(patch_size=size)] = "coarser patch", share
    return found


def measured(
    real: Real, question: str, study: str, run: Run, settings: dict[Setting, tuple[str, float]], **more: str
) -> list[Row]:
    """Rows of a table, with label, share of the tokens, and `more`; they are added to the results."""
    rows = real.tradeoff("_".join((study, *more.values())), run).measure(settings)
    labels = [{"label": label, "share": share} for label, share in settings.values()]
    rows = [small_and_all(run, row) | label | more for row, label in zip(rows, labels, strict=True)]
    real.append(question, study, rows, **real.conditions(run))
    return rows


CELLS = {
    "mIoU": "{mean_iou:.1f}",
    "IoU of the small classes": "{small_iou:.1f}",
    "boundary IoU": "{boundary_iou:.1f}",
    "images/s, token scores": "{images_per_second_scores:.2f}",
    "images/s, label maps": "{images_per_second:.2f}",
    "GFLOPs": "{gflops:.1f}",
    "realized share": "{realized_share:.2f}",
}


def by_share(rows: Sequence[Row], text: str, title: str) -> str:
    """A table: a line per method, a column per share of the tokens; a method without a setting has all in its name."""
    names = {share: f"share_{round(100 * share)}" for share in SHARES}
    lines = []
    for label in dict.fromkeys(row["label"] for row in rows):
        own = {row["share"]: text.format(**row) for row in rows if row["label"] == label}
        fixed = own.get(1.0) or own.get(0.0)
        cells = {name: own.get(share, "") for share, name in names.items()}
        lines.append(cells | {"label": label if fixed is None else f"{label}: {fixed}"})
    return markdown({title: "{label}"} | {f"{100 * share:g} %": f"{{{name}}}" for share, name in names.items()}, lines)


# ---------------------------------------------------------------------------------------------- size and merging


def frontier(real: Real) -> str:
    """Image size and merging together: the settings that no others beat."""
    run = real.run(BEST)
    settings: dict[Setting, tuple[str, float]] = {}
    for size in tqdm(SIZES, desc="sizes", leave=False):
        at_size = run.with_settings(PURE, {}, size)
        views = [*at_size.views(DATASET, VIEWS)]
        settings[Setting(im_size=size)] = PURE, 1.0
        for name, shares in FRONTIER.items():
            for share in shares:
                setting = at_share(at_size, name, share, views, size, **OWN_OPTIONS.get(name, {}))
                settings[setting] = f"{name}, {100 * share:g} %", share
    rows = measured(real, "size", "frontier", run, settings)
    for score, name in (
        ("mean_iou", "mIoU, %"),
        ("small_iou", "IoU of small classes, %"),
        ("boundary_iou", "boundary IoU, %"),
    ):
        real.draw(f"frontier_{score}", tradeoff_plot(rows, [row["label"] for row in rows], score, name))
    columns = {
        "shorter side": "{im_size}",
        "method, tokens left": "{label}",
        "label maps/s": "{images_per_second:.2f}",
        "mIoU": "{mean_iou:.2f}",
        "small classes": "{small_iou:.2f}",
        "boundary IoU": "{boundary_iou:.2f}",
    }
    best = hull([1 / row["images_per_second"] for row in rows], [row["mean_iou"] for row in rows])
    return markdown(columns, [rows[index] for index in best])


def equal(real: Real) -> str:
    """Speed at equal mIoU in every precision, plain and merged at every size; and the mIoU on images not chosen by."""
    run = real.run(BEST)
    runs = {}
    for size in SIZES:
        at_size = run.with_settings(PURE, {}, size)
        views = [*at_size.views(DATASET, VIEWS)]
        runs[size, PURE] = at_size
        for name, shares in EQUAL.items():
            for share in shares:
                own = at_share(at_size, name, share, views, size)
                runs[size, f"{name}, {100 * share:g} %"] = own.apply_to(run)
    dataset, _ = run.open()
    rows = in_every_precision(
        runs, [dataset[index].image for index in spread(COST_IMAGES, len(dataset))], real.max_images
    )
    tests = {
        key: own.evaluate(SPLITS[-1], n_images=real.max_images) for key, own in tqdm(runs.items(), "test", leave=False)
    }
    shown = []
    for (size, label, dtype), found in rows.items():
        row = {"im_size": size, "label": label, "dtype": dtype, **found} | small_and_all(run, found["scores"])
        row |= {"test": small_and_all(run, tests[size, label])} if dtype == "float32" else {}
        shown.append({name: value for name, value in row.items() if name != "scores"})
    real.append("size", "equal", shown, **real.conditions(run))
    columns = {"shorter side": "{im_size}", "method": "{label}", "precision": "{dtype}"}
    return markdown(columns | {"label maps/s": "{images_per_second:.2f}", "mIoU": "{mean_iou:.2f}"}, shown)


# ---------------------------------------------------------------------------------------------- ablations


def ablations(real: Real) -> str:
    """Merging layers and the weight of merged tokens in attention, at the same number of tokens, without training."""
    run = real.run(BEST)
    views = [*run.views(DATASET, VIEWS)]
    tried: dict[Setting, tuple[str, float]] = {Setting(): (PURE, 1.0)}
    for name, fixed in tqdm(
        [(n, f) for n, several in ABLATIONS.items() for f in several], desc="settings", leave=False
    ):
        words = ", ".join(f"{key} {' '.join(map(str, v)) if isinstance(v, list) else v}" for key, v in fixed.items())
        tried[at_share(run, name, ABLATED_AT, views, **fixed)] = f"{name}, {words}", ABLATED_AT
    layers = AUTO_LAYERS
    found = automatic_thresholds(run.path, DATASET, layers, real.device, real.max_images)
    for layer in layers:
        options = {"layers": [layer], "threshold": found[layer].threshold}
        tried[Setting("graph", options)] = f"graph, layers {layer}, auto: τ {found[layer].threshold:.3f}", 0.0
    rows = measured(real, "methods", "ablations", run, tried)
    columns = {
        "method": "{label}",
        "tokens": "{tokens:.0f}",
        "mIoU": "{mean_iou:.2f}",
        "small classes": "{small_iou:.2f}",
        "GFLOPs": "{gflops:.1f}",
        "token scores/s": "{images_per_second_scores:.2f}",
    }
    return markdown(columns, rows)


# ---------------------------------------------------------------------------------------------- training with merging


def trained(real: Real) -> str:
    """Gains of training with merging, of the decoder alone and of everything, against as much training without it."""
    run = real.run(BEST)
    views = [*run.views(DATASET, VIEWS)]
    chosen = {name: at_share(run, name, share, views) for name, share in TRAINED.items()}
    rows = []
    for name, one in {PURE: Setting(), **chosen}.items():
        flags = ["--finetune", f"{{work}}/{BEST}", "--patch-type", name]
        flags += [word for key, value in one.options.items() for word in (FLAGS[key], str(value))]
        stages = {"applied": [one.apply_to(run)]}
        if name != PURE:
            train(real, f"{name}_decoder", [*DECODER_ALONE, *flags])
            stages["decoder"] = [real.run(f"{name}_decoder")]
        seeds = SEEDS if name in SEEDED else SEEDS[:1]
        names = {seed: f"{name}_longer" + f"_{seed}" * (seed > 0) for seed in seeds}
        for seed, longer in names.items():
            train(real, longer, [*LONGER, *flags, "--seed", str(seed)])
        stages["everything"] = [real.run(longer) for longer in names.values()]
        scores = {
            key: [small_and_all(own, own.evaluate(n_images=real.max_images)) for own in runs]
            for key, runs in stages.items()
        }
        rows.append({"method": name, "tokens": mean_tokens(stages["applied"][0].model, views), **scores})
    real.append("quality", "trained", rows, **real.conditions(run))
    shown = [{key: row[key] for key in ("method", "tokens")} | over_seeds(row, STAGES) for row in rows]
    return markdown(
        {"method": "{method}", "tokens": "{tokens:.0f}"} | {v: f"{{{k}}}" for k, v in STAGES.items()}, shown
    )


def heads(real: Real) -> str:
    """Other decoders on the encoder of the best model, which stays as it is; ClustViT and EoMT train with theirs."""
    rows = []
    for name, options in tqdm({"linear": [], **HEADS}.items(), desc="heads", unit="run", leave=False):
        if name in CROPS_FIRST:
            train(real, f"{name}_crops", CROPS_FIRST[name])
        if options:
            train(real, name, options)
        run = real.run(name if options else BEST)
        settings = {Setting(): (PURE, 1.0)}
        if run.method == PURE:
            views = [*run.views(DATASET, VIEWS)]
            for method, share in TRAINED.items():
                settings[at_share(run, method, share, views)] = method, share
        else:
            settings[Setting(run.method, run.options)] = run.method, 0.0
        rows += measured(real, "quality", "heads", run.unpatched(), settings, head=name)
    columns = {
        "model": "{head}",
        "method": "{label}",
        "tokens": "{tokens:.0f}",
        "mIoU (small classes)": "{mean_iou:.2f} ({small_iou:.2f})",
        "images/s": "{images_per_second:.2f}",
        "realized share": "{realized_share:.2f}",
    }
    return markdown(columns, rows)


# ---------------------------------------------------------------------------------------------- what merges


def tokens(real: Real) -> str:
    """Effects of thresholds on these features: similarities, tokens that are left, labels in a group."""
    run = real.run(BEST)
    dataset, _ = run.open()
    samples = [dataset[index] for index in spread(N_SIMILAR, len(dataset))]
    layers = range(1, len(run.model.encoder.blocks) + 1)
    found = similarities(run, samples, layers)
    values = {layer: np.concatenate([x.ravel() for pair in pairs for x in pair]) for layer, pairs in found.items()}
    real.draw("similarities", similarity_histograms(values))
    kept = {
        layer: {t: float(np.mean([kept_share(*pair, t) for pair in pairs])) for t in THRESHOLDS}
        for layer, pairs in found.items()
    }
    views = [*run.views(DATASET, VIEWS)]
    chosen = {name: at_share(run, name, PURE_AT, views).apply_to(run) for name in PURE_OF}
    pure = {name: purity(one, samples) for name, one in tqdm(chosen.items(), desc="groups", leave=False)}
    # Not among the results: these are photographs, whose license may forbid to show them.
    shown_samples = [samples[index] for index in spread(N_PICTURES, len(samples))]
    write_picture(real.work / "regions.png", region_sheet(chosen, shown_samples))
    names = [sample.name for sample in samples]
    spreads = {layer: [float(v.mean()), float(v.std())] for layer, v in values.items()}
    by_layer = [{"layer": layer, "kept": kept[layer], "similarity": spreads[layer]} for layer in layers]
    real.append("quality", "tokens", by_layer, images=names)
    real.append("quality", "purity", [{"method": name, **one} for name, one in pure.items()], images=names)
    shown = [
        {"layer": layer} | {f"t{index}": f"{100 * share:.0f}" for index, share in enumerate(shares.values())}
        for layer, shares in kept.items()
    ]
    first = markdown({"layer": "{layer}"} | {f"τ {t:g}": f"{{t{index}}}" for index, t in enumerate(THRESHOLDS)}, shown)
    columns = {"method": "{method}", "tokens": "{tokens:.0f}", "labels per merged group": "{labels_per_group:.2f}"}
    columns |= {"mIoU of the best label per group": "{best_iou:.1f}", "small classes that it gets right": "{small:.1f}"}
    rows = []
    for name, one in pure.items():
        small = [one["pure"][label] for label in SMALL if label in one["pure"]]
        rows.append({"method": name, **one, "small": float(np.mean(small)) if small else math.nan})
    return first + "\n\n" + markdown(columns, rows)


# ---------------------------------------------------------------------------------------------- the whole way


def speed(real: Real) -> str:
    """From a photograph to its labels: plain PyTorch against runs in all precisions, with the mIoU."""
    run = real.run(BEST)
    views = [*run.views(DATASET, VIEWS)]
    runs = {"ours, not merged": run}
    for method, share in FASTER.items():
        runs[f"ours, {method}, {100 * share:g} % of the tokens"] = at_share(run, method, share, views).apply_to(run)
    dataset, _ = run.open()
    rows = measure_speed(runs, dataset[0].image, real.max_images)
    real.append("deployed", "speed", rows)
    shown = [row | {f"ratio_{name}": row[name] / rows[0][name] for name in PHOTOS} for row in rows]
    columns = {"model": "{name}", "precision": "{dtype}"}
    columns |= {f"{name}, photographs/s": f"{{{name}:.2f}} ({{ratio_{name}:.1f}} ×)" for name in PHOTOS}
    return markdown(columns | {"mIoU": "{mean_iou:.2f}"}, shown)


def runtimes(real: Real) -> str:
    """The model without and with merging in PyTorch and in the runtimes that people deploy on, in every precision."""
    pure, folder = real.run(BEST), real.work / "exported"
    folder.mkdir(exist_ok=True)
    how = Export("scores", RUNTIMES, batch_size=1, opset=OPSET, float16=False, int8=True, images=None)
    candidates = []
    for method, share in (PURE, 1.0), *DEPLOYED.items():
        run = pure if method == PURE else pure.with_settings(method, {"tokens": share})
        label = method if method == PURE else f"{method}, {100 * share:g} %"
        candidates += in_pytorch(run, label) + how.made(run, folder / f"{method}.onnx", label)
    rows = compare(candidates, pure.views(DATASET), how.output)
    for row, one in zip(rows, tqdm(candidates, desc="scores", unit="model", leave=False), strict=True):
        row |= {"label": one.merging, "mean_iou": one.run.evaluate(n_images=real.max_images)["mean_iou"]}
    real.append("deployed", "runtimes", rows, **real.conditions(pure))
    return markdown(COLUMNS | {"mIoU": "{mean_iou:.2f}"}, rows)


# ---------------------------------------------------------------------------------------------- classification


def classification(real: Real) -> str:
    """Accuracy of the frozen backbone on a small labelled set."""
    run = real.run(FROZEN_RUN)
    names = [name for name in NO_TRAINING if patch.find(name).takes("r")]
    rows = classify(run.model.encoder, run.normalization, names, CLASSIFIED, real.device, real.max_images)
    real.append("quality", "classification", rows)
    columns = {"method": "{method}", "tokens left": "{share:.0%}", "r": "{r}", "accuracy, %": "{accuracy:.2f}"}
    return markdown(columns | {"images/s": "{images_per_second:.1f}"}, rows)


STEPS: dict[str, Callable[[Real], str]] = {
    "models": models,
    "methods": methods,
    "frontier": frontier,
    "equal": equal,
    "ablations": ablations,
    "trained": trained,
    "heads": heads,
    "tokens": tokens,
    "speed": speed,
    "runtimes": runtimes,
    "classification": classification,
}


@click.command(cls=Command)
@click.option("--weights", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="[default: timm's]")
@click.option(
    "--work",
    type=click.Path(file_okay=False, path_type=Path),
    default="runs/real",
    show_default=True,
    help="Folder of trainings and tables.",
)
@click.option(
    "--steps", type=Listed(str, lambda: STEPS), default=",".join(STEPS), show_default=True, help="What to make."
)
@click.option("--max-images", type=click.IntRange(min=1), help="Images to score, spread over all.  [default: all]")
@click.option("--amp", is_flag=True, help="Train in bfloat16, fast where the processor has instructions for it.")
@out_option
@device_option
def main(
    weights: Path | None,
    work: Path,
    steps: tuple[str, ...],
    max_images: int | None,
    amp: bool,
    out: Path,
    device: torch.device,
) -> None:
    """Train DINOv2 ViT-S/14 on CamVid and measure what merging costs and gains.

    A finished training or measurement is not repeated, so the command may be interrupted. Every step adds its rows to
    the results in OUT, and writes its table to WORK/STEP.md.
    """
    real = Real(work, out, weights, device, max_images, amp)
    for step in steps:
        table = STEPS[step](real)
        write_text(work / f"{step}.md", table + "\n")
        click.echo(f"\n{step}\n\n{table}")


if __name__ == "__main__":
    main()
