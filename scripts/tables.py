"""The tables of the documents, made from the files of results.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`. `python scripts/tables.py` writes all of them anew;
`--check` only says which documents differ from the files.
"""

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import click
import numpy as np
from results_file import MACHINES, RESULTS, known_machines, read

from segm.cli import Command, markdown
from segm.storage import write_text
from vis import hull

ROOT = RESULTS.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "RESULTS.md", *sorted(RESULTS.glob("*.md"))]
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
PLAIN, SMALLER, COARSER = "pure", "smaller image", "coarser patch"
LOSS = 0.5  # mIoU that a setting may lose and still count as of equal quality
SMALL = ("pole", "sign-symbol", "pedestrian", "bicyclist")

Row = dict[str, Any]
TABLES: dict[str, Callable[[], str]] = {}


def table(function: Callable[[], str]) -> Callable[[], str]:
    """Registers a table under the name of its function, with hyphens."""
    TABLES[function.__name__.replace("_", "-")] = function
    return function


@click.command(cls=Command)
@click.option("--check", is_flag=True, help="Write nothing; exit with status 1 if a document differs.")
def main(check: bool) -> None:
    """Write the tables of README.md, RESULTS.md and results/*.md from results/*.json."""
    differing = []
    for file in DOCUMENTS:
        text = file.read_text(encoding="utf-8")
        if (made := filled(text)) != text:
            differing.append(str(file.relative_to(ROOT)))
            if not check:
                write_text(file, made)
    if differing:
        click.echo(f"{'differ from the files of results' if check else 'written'}: {', '.join(differing)}")
    sys.exit(check and bool(differing))


def filled(text: str) -> str:
    """A document with its tables made anew.

    Raises:
        ValueError: a mark names no table.
    """

    def made(found: re.Match[str]) -> str:
        if found[2] not in TABLES:
            raise ValueError(f"no table {found[2]}: choose from {', '.join(TABLES)}")
        return f"{found[1]}{TABLES[found[2]]()}\n{found[3]}"

    return MARKED.sub(made, text)


# ---------------------------------------------------------------------------------------------- rows


@cache
def _entries(question: str) -> dict[str, Row]:
    return {entry["id"]: entry for entry in read(question)}


def rows_of(question: str, *ids: str) -> list[Row]:
    """The rows of some entries, each with the machine and the note of its entry."""
    chosen = [_entries(question)[one] for one in ids]
    return [row | {"machine": one["machine"], "note": one.get("note", "")} for one in chosen for row in one["rows"]]


def benchmarks(*numbers: int) -> list[Row]:
    """The rows of some runs of `benchmark.py`, with a name."""
    found = rows_of("time", *(f"benchmark-{number}" for number in numbers))
    name = "{model}, batch {batch_size}, {method}, {tokens:.0f} tokens"
    return [row | {"name": name.format(**row)} for row in found]


def same(row: Row, **wanted: Any) -> bool:
    """Return whether a row has these values."""
    return all(row[key] == value for key, value in wanted.items())


def pick(rows: Iterable[Row], **wanted: Any) -> Row:
    """The one row with these values."""
    (found,) = (row for row in rows if same(row, **wanted))
    return found


def titled(label: str) -> str:
    """A label as readers know it."""
    return "not merged" if label == PLAIN else label


def by_column(rows: Sequence[Row], line: str, column: str, titles: Mapping[Any, str], text: str, title: str) -> str:
    """A table with a line per value of one key, a column per value of another; what is missing stays empty.

    Args:
        rows: of results.
        line, column: keys of the rows.
        titles: value of `column` -> title.
        text: format string of a cell.
        title: of the first column.
    """
    cells: dict[Any, dict[str, str]] = {}
    for row in rows:
        own = cells.setdefault(row[line], {"line": str(row[line])} | {f"c{i}": "" for i in range(len(titles))})
        own[f"c{[*titles].index(row[column])}"] = text.format(**row)
    columns = {title: "{line}"} | {shown: f"{{c{i}}}" for i, shown in enumerate(titles.values())}
    return markdown(columns, cells.values())


# ---------------------------------------------------------------------------------------------- time

M1_RUNS = (1, 2, 3, 4, 5, 6, 7)
EOMT = (26, 27, 28, 29, 30, 21, 22, 23, 24, 12, 15)


TIME = {
    "ViT, batch, method": "{model}, {batch_size}, {method}",
    "tokens of 1024": "{tokens:.0f}",
    "GFLOPs": "{gflops_pure:.1f} → {gflops:.1f}",
    "images/s": "{scores_pure:.2f} → {scores:.2f}",
    "times as fast": "{ratio_scores:.2f}",
    "realized share": "{share_scores:.2f}",
}


@table
def time() -> str:
    """Ten rows of one machine."""
    rows = benchmarks(*M1_RUNS)
    at_690 = [row for row in rows if row["tokens"] > 600]
    chosen = [row for row in at_690 if same(row, method="graph", batch_size=1)]
    chosen += [row for row in at_690 if row["model"] == "S" and row not in chosen]
    return markdown(TIME, chosen + [row for row in rows if row not in at_690])


@table
def time_shares() -> str:
    """All rows of one machine."""
    return markdown(TIME, benchmarks(*M1_RUNS))


@table
def time_labels() -> str:
    """Label maps of the same rows."""
    return markdown(
        {
            "ViT, batch, method": "{name}",
            "plain PyTorch": "{predict_eager:.2f}",
            "not merged": "{predict_pure:.2f}",
            "merged": "{predict:.2f}",
            "merged to plain PyTorch": "{ratio_predict_eager:.2f}",
        },
        benchmarks(*M1_RUNS),
    )


@table
def time_merges() -> str:
    """The time of the merges of the same rows."""
    return markdown(
        {
            "ViT, batch, method": "{name}",
            "merges, % of a pass": "{merges}",
            "peak MiB, not merged": "{memory_scores_pure_mib:.0f}",
            "peak MiB, merged": "{memory_scores_mib:.0f}",
        },
        [row | {"merges": overhead(row)} for row in benchmarks(*M1_RUNS)],
    )


def overhead(row: Row) -> str:
    """The time of the merges, percent of the pass of the plain model."""
    steps = [100 * share for share in row["overhead"].values()]
    if len(steps) > 2:
        return f"{sum(steps):.1f} in {len(steps)} layers"
    return " + ".join(f"{step:.2f}" for step in steps)


@table
def time_tome() -> str:
    """The longest operators of ToMe's merges in ViT-T."""
    profile = pick(benchmarks(5), model="T")["profile"]
    columns = {"operator": "`{operator}`", "calls per pass": "{calls}", "share of the merges": "{share:.3f}"}
    return markdown(columns, profile[:8])


@table
def time_fewer() -> str:
    """The realized share at 410 tokens, machine by machine."""
    rows = [row for row in benchmarks(6, 9, 11, 13, 16, 18, 25) if row["method"] == "graph"]
    names = {"T": "T", "S": "S", "B": "B"}
    shown = [
        row | {"run": f"{row['machine']}{', ' * bool(row['note'])}{row['note'].partition(',')[0]}"} for row in rows
    ]
    shown = [row | {"alone": f" ({row['share_products']:.2f})" if "share_products" in row else ""} for row in shown]
    return by_column(shown, "run", "model", names, "{share_scores:.2f}{alone}", "machine")


@table
def time_keymatch() -> str:
    """keymatch at half of the tokens."""
    columns = TIME | {"of the products": "{share_products:.2f}"}
    columns.pop("GFLOPs")
    return markdown(columns, benchmarks(31, 32))


@table
def time_onednn() -> str:
    """Both libraries on one machine."""
    keys = ("scores_pure", "scores", "predict_eager", "predict")
    rows = [
        {"model": one["model"]} | {key: f"{one[key]:.2f} → {other[key]:.2f}" for key in keys}
        for one, other in zip(benchmarks(16), benchmarks(18), strict=True)
    ]
    columns = {"ViT": "{model}", "images/s, not merged": "{scores_pure}", "images/s, 410 tokens": "{scores}"}
    columns |= {"label maps/s, plain PyTorch": "{predict_eager}", "label maps/s, 410 tokens": "{predict}"}
    return markdown(columns, rows)


OPERATORS = {
    "linear layers": ("addmm",),
    "attention": ("_scaled_dot_product_flash_attention_for_cpu",),
    "outside PyTorch's operators": ("outside",),
    "GELU": ("gelu",),
    "copies (`addmm` starts from its bias)": ("copy_",),
    "patch embedding": ("mkldnn_convolution",),
    "additions, layer norm": ("add", "native_layer_norm"),
}


@table
def time_operators() -> str:
    """The time of a pass by operator, without merging and at 410 tokens."""
    passes = {row["operator"].removeprefix("aten::"): row for row in benchmarks(14)[0]["passes"]}
    rows = []
    for title, names in OPERATORS.items():
        pure, merged = (sum(passes[name][key] for name in names) for key in ("ms_pure", "ms"))
        rows.append({"operator": title, "pure": pure, "merged": merged, "less": pure / merged})
    columns = {"operator": "{operator}", "not merged, ms": "{pure:.1f}", "merged, ms": "{merged:.1f}"}
    return markdown(columns | {"ratio": "{less:.1f}"}, rows)


@table
def time_eomt() -> str:
    """Every run of EoMT."""
    rows = []
    for row in benchmarks(*EOMT):
        low = row.get("share_scores_low")
        interval = "" if low is None else f" ({low:.2f} to {row['share_scores_high']:.2f})"
        masks = ", with the masks" * row["note"].startswith("operations")
        rows.append(row | {"interval": interval, "masks": masks})
    return markdown(
        {
            "machine, batch, method": "{machine}, {batch_size}, {method}{masks}",
            "tokens of 1024": "{tokens:.0f}",
            "GFLOPs": "{gflops_pure:.1f} → {gflops:.1f}",
            "images/s": "{scores_pure:.2f} → {scores:.2f}",
            "realized share": "{share_scores:.2f}{interval}",
            "products alone": "{share_products:.2f}",
        },
        rows,
    )


@table
def time_eomt_labels() -> str:
    """Label maps of EoMT on one machine; one run timed eager PyTorch as one would write it."""
    rows = []
    for number in (30, 27, 26, 28, 29):
        for row in benchmarks(number):
            eager, ratio = f"{row['predict_eager']:.2f}", f"{row['ratio_predict_eager']:.2f}"
            before = ", all masks at once" * bool(row["note"])
            own = {"eager": eager, "to_eager": ratio} if number == 30 else {"eager": "", "to_eager": ""}
            rows.append(row | own | {"before": before})
    return markdown(
        {
            "batch, method": "{batch_size}, {method}{before}",
            "plain PyTorch": "{eager}",
            "not merged": "{predict_pure:.2f}",
            "merged": "{predict:.2f}",
            "merged to not merged": "{ratio_predict:.2f}",
            "merged to plain PyTorch": "{to_eager}",
        },
        rows,
    )


# ---------------------------------------------------------------------------------------------- every method

SHARES = {share: f"{100 * share:g} %" for share in (0.9, 0.75, 0.6, 0.45, 0.3)}
SHORT = (PLAIN, "keymatch", "graph", "algm", "tome", "atc", "diffrate", "random", SMALLER, COARSER)
MEASURED = {
    "quality-miou": ("mIoU", "{mean_iou:.1f}"),
    "quality-small": ("IoU of the small classes", "{small_iou:.1f}"),
    "quality-boundary": ("boundary IoU", "{boundary_iou:.1f}"),
    "methods-labels": ("label maps/s", "{images_per_second:.2f}"),
    "methods-gflops": ("GFLOPs", "{gflops:.1f}"),
    "methods-shares": ("realized share", "{realized_share:.2f}"),
}


def by_share(rows: Sequence[Row], text: str, title: str) -> str:
    """A line per method, a column per share of the tokens; a method without a setting has its value in its name."""
    fixed = {row["label"]: text.format(**row) for row in rows if row["share"] not in SHARES}
    cells = []
    for row in rows:
        label = row["label"]
        if label in fixed:
            cells.append({"label": f"{titled(label)}: {fixed[label]}", "share": max(SHARES), "cell": ""})
        else:
            cells.append({"label": label, "share": row["share"], "cell": text.format(**row)})
    return by_column(cells, "label", "share", SHARES, "{cell}", title)


def every_method() -> list[Row]:
    """All settings of one run."""
    return rows_of("methods", "methods-2")


KEYMATCH = {
    "vectors: keys of all heads": "vectors: keys of all heads, concatenated",
    "vectors: unit keys": "vectors: mean of the heads' normalized keys",
    "the mean not taken off": "mean not subtracted",
    "less 0.1 per 10 patches squared": "penalty of 0.1 · (distance / 10 patches)²",
    "less 0.3 per 10 patches squared": "penalty of 0.3 · (distance / 10 patches)²",
    "falls fast, then slowly": "budgets fall fast, then slowly",
    "falls slowly, then fast": "budgets fall slowly, then fast",
}


@table
def keymatch() -> str:
    """The choices in keymatch, one by one."""
    found = rows_of("methods", "keymatch-1")
    rows = [row | {"title": titled(KEYMATCH.get(row["label"], row["label"]))} for row in found]
    columns = {"variant": "{title}", "GFLOPs": "{gflops:.1f}", "mIoU": "{mean_iou:.2f}"}
    return markdown(columns | {"small classes": "{small_iou:.1f}", "boundary IoU": "{boundary_iou:.1f}"}, rows)


def by_measure(title: str, text: str) -> str:
    """One measure of all settings."""
    return by_share(every_method(), text, title)


@table
def quality() -> str:
    """The mIoU of ten methods over the tokens that are left."""
    rows = [row for row in every_method() if row["label"] in SHORT]
    return by_share(sorted(rows, key=lambda row: SHORT.index(row["label"])), "{mean_iou:.1f}", "mIoU")


@table
def methods() -> str:
    """Of every method the fastest setting that keeps the mIoU to `LOSS`, if it is faster than the plain model."""
    rows = every_method()
    plain = pick(rows, label=PLAIN)
    fastest: dict[str, Row] = {}
    for row in rows:
        kept = row is not plain and plain["mean_iou"] - row["mean_iou"] <= LOSS + 1e-9
        if kept and row["images_per_second"] > fastest.get(row["label"], plain)["images_per_second"]:
            fastest[row["label"]] = row | {"ratio": row["images_per_second"] / plain["images_per_second"]}
    return markdown(
        {
            "method, tokens of 768": "{label}, {tokens:.0f}",
            "label maps/s": "{images_per_second:.2f}",
            "times as fast": "{ratio:.2f}",
            "mIoU": "{mean_iou:.1f}",
            "small classes": "{small_iou:.1f}",
            "boundary IoU": "{boundary_iou:.1f}",
        },
        sorted(fastest.values(), key=lambda row: -row["images_per_second"]),
    )


NEEDS = {
    "graph": "a threshold",
    "algm": "a threshold",
    "dtem": "training",
    "diffrate": "CLS",
    "ltmp": "thresholds; better trained",
    "fpet": "better trained",
}


@table
def methods_costs() -> str:
    """Needs of each method, its cost with random weights, and its quality on drawn scenes."""
    trained = {(row["method"], row["share"]): f"{row['trained']:.1f}" for row in operations() if "trained" in row}
    rows = []
    for row in benchmarks(8):
        name, steps = row["method"], [*row["overhead"].values()]
        rows.append(
            row
            | {"needs": NEEDS.get(name, ""), "merges": f"{100 * sum(steps):.1f} in {len(steps)}"}
            | {"first": trained.get((name, 0.75), ""), "second": trained.get((name, 0.6), "")}
        )
    return markdown(
        {
            "method, tokens of 1024": "`{method}`, {tokens:.0f}",
            "needs": "{needs}",
            "merging, % of a pass, in layers": "{merges}",
            "times as fast (realized share)": "{ratio_scores:.2f} ({share_scores:.2f})",
            "mIoU at 75 % of the operations": "{first}",
            "at 60 %": "{second}",
        },
        rows,
    )


def operations() -> list[Row]:
    """All methods at the same operations."""
    return rows_of("methods", "operations-1")


@table
def methods_operations() -> str:
    """mIoU and speed of every method at the same operations."""
    known = {(row["method"], row["share"]): row for row in operations()}
    rows = []
    for name in dict.fromkeys(row["method"] for row in operations()):
        if name == PLAIN:
            continue
        shown = {"method": name}
        for key, share in (("first", 0.75), ("second", 0.6)):
            row = known.get((name, share), {})
            scores = [f"{row[stage]:.2f}" if stage in row else "-" for stage in ("applied", "trained")]
            shown[key] = ", ".join(scores) if row else ""
            shown[f"{key}_speed"] = f"{row['images_per_second']:.0f}" if row else ""
        rows.append(shown)
    columns = {"method": "{method}", "75 %: applied, trained": "{first}", "75 %: images/s": "{first_speed}"}
    return markdown(columns | {"60 %: applied, trained": "{second}", "60 %: images/s": "{second_speed}"}, rows)


@table
def methods_layers() -> str:
    """Layers and attention modes at the same number of tokens."""
    rows = [row for row in rows_of("methods", "ablations-1") if "auto" not in row["label"]]
    return _ablations(rows)


@table
def methods_auto() -> str:
    """Automatic thresholds."""
    return _ablations([row for row in rows_of("methods", "ablations-1") if "auto" in row["label"]])


def _ablations(rows: Sequence[Row]) -> str:
    return markdown(
        {
            "method": "{label}",
            "tokens of 768": "{tokens:.0f}",
            "mIoU": "{mean_iou:.2f}",
            "small classes": "{small_iou:.2f}",
            "GFLOPs": "{gflops:.1f}",
        },
        [row | {"label": titled(row["label"])} for row in rows],
    )


TABLES |= {name: partial(by_measure, *words) for name, words in MEASURED.items()}


# ---------------------------------------------------------------------------------------------- quality

MODELS = {
    "frozen_0": "decoder alone, on features of the frozen encoder, seed 0",
    "frozen_1": "the same, seed 1",
    "frozen_2": "the same, seed 2",
    "mask_transformer": "the same with a mask transformer, seed 0",
    "crops": "seed 0, then the whole model on crops of 252×252 pixels",
    "tuned": "then the whole model on whole images",
}
HEADS = {
    "linear": "linear, trained with the encoder",
    "mask": "mask transformer, 2 epochs",
    "linear_bn": "linear with BatchNorm, 4 epochs",
    "setr_pup": "SETR-PUP, 2 epochs",
    "eomt": "EoMT, trained with the encoder, 5 epochs",
}


@table
def quality_models() -> str:
    """The plain models."""
    rows = rows_of("quality", "models-1")
    columns = {"model": "{title}", "epochs": "{epochs}"}
    columns |= {f"mIoU, {split}": f"{{{split}[mean_iou]:.2f}}" for split in ("val", "test")}
    columns |= {"small classes, val": "{val[small_iou]:.2f}"}
    return markdown(columns, [pick(rows, name=name) | {"title": title} for name, title in MODELS.items()])


@table
def quality_trained() -> str:
    """Quality that training with merging recovers."""
    stages = {"applied": "applied", "decoder": "decoder trained", "everything": "whole model trained"}
    rows = [
        {"method": titled(row["method"]), "tokens": row["tokens"]} | over_seeds(row, stages)
        for row in rows_of("quality", "trained-2")
    ]
    columns = {"method": "{method}", "tokens of 768": "{tokens:.0f}"}
    return markdown(columns | {title: f"{{{key}}}" for key, title in stages.items()}, rows)


def over_seeds(row: Row, stages: Iterable[str]) -> dict[str, str]:
    """A cell per stage of a training, from its scores by seed: mIoU, of several its mean and standard deviation, and in
    brackets that of the small classes."""
    cells = dict.fromkeys(stages, "")
    for key in {*cells} & {*row}:
        ious, small = ([scores[name] for scores in row[key]] for name in ("mean_iou", "small_iou"))
        spread = f" ± {np.std(ious, ddof=1):.2f}" if len(ious) > 1 else ""
        cells[key] = f"{np.mean(ious):.2f}{spread} ({np.mean(small):.2f})"
    return cells


@table
def quality_heads() -> str:
    """The mIoU of other decoders."""
    return _heads("{mean_iou:.2f} ({small_iou:.2f})")


@table
def quality_heads_speed() -> str:
    """Label maps/s and realized share of other decoders."""
    return _heads("{images_per_second:.2f} ({realized_share:.2f})")


def _heads(text: str) -> str:
    rows = rows_of("quality", *(f"heads-{number}" for number in (6, 7, 8, 2, 3)))
    shown = [row | {"decoder": HEADS[row["head"]]} for row in rows]
    counts = {row["label"]: f"{titled(row['label'])}, {row['tokens']:.0f}" for row in rows_of("quality", "heads-6")}
    return by_column(shown, "decoder", "label", counts, text, "decoder")


@table
def quality_clustvit() -> str:
    """ClustViT, not merged and merged."""
    return markdown(
        {
            "tokens of 768": "{tokens:.0f}",
            "GFLOPs": "{gflops:.1f}",
            "label maps/s": "{images_per_second:.2f}",
            "mIoU (small classes)": "{mean_iou:.1f} ({small_iou:.1f})",
            "boundary IoU": "{boundary_iou:.1f}",
        },
        rows_of("quality", "heads-5"),
    )


@table
def quality_thresholds() -> str:
    """Tokens that thresholds leave, layer by layer."""
    rows = [
        {"layer": row["layer"], "threshold": threshold, "kept": 100 * share}
        for row in rows_of("quality", "tokens-1")
        for threshold, share in row["kept"].items()
    ]
    titles = {row["threshold"]: f"τ {row['threshold']}" for row in rows}
    return by_column(rows, "layer", "threshold", titles, "{kept:.0f}", "layer")


@table
def quality_groups() -> str:
    """Purity of merged groups."""
    rows = []
    for row in rows_of("quality", "purity-1"):
        rows.append(row | {"small": float(np.mean([row["pure"][name] for name in SMALL]))})
    columns = {
        "method": "{method}",
        "tokens of 768": "{tokens:.0f}",
        "labels per merged group": "{labels_per_group:.2f}",
    }
    return markdown(columns | {"best mIoU": "{best_iou:.1f}", "small classes, best": "{small:.1f}"}, rows)


@table
def quality_classes() -> str:
    """Accuracy on digits, and images/s, at two numbers of tokens."""
    rows = rows_of("quality", "classification-1")
    counts = {0: "64 tokens", 1: "52 tokens", 3: "28 tokens"}
    shown = [row | {"method": titled(row["method"])} for row in rows]
    return by_column(shown, "method", "r", counts, "{accuracy:.1f} ({images_per_second:.1f})", "method")


# ---------------------------------------------------------------------------------------------- size and merging


SIDES = (280, 336, 392, 448, 504)  # shorter sides, pixels, of tables that have a column for each


def sizes() -> list[Row]:
    """All settings of the frontier, each with its speed against the plain model of the same mIoU."""
    rows = rows_of("size", "frontier-2")
    plain = sorted((row for row in rows if row["label"] == PLAIN), key=lambda row: row["mean_iou"])
    return [row | {"equal": times_as_fast(row, plain)} for row in rows]


def times_as_fast(row: Row, plain: Sequence[Row]) -> str:
    """Speed against a plain model of the same mIoU, whose time is interpolated between the measured image sizes.

    Args:
        row: of results.
        plain: rows of the plain model, by rising mIoU.

    Returns:
        A text; "-" below the lowest plain mIoU; above the highest, "> " and the speed against that one.
    """
    scores, times = [one["mean_iou"] for one in plain], [1 / one["images_per_second"] for one in plain]
    if row["mean_iou"] < scores[0]:
        return "-"
    found = row["images_per_second"] * float(np.interp(row["mean_iou"], scores, times))
    return f"{'> ' if row['mean_iou'] > scores[-1] else ''}{found:.2f}"


SHOWN = ("algm, 60 %", "keymatch, 60 %", "keymatch, 50 %")


@table
def size() -> str:
    """Plain and merged at every image size."""
    rows, lines = sizes(), []
    for plain in (row for row in rows if row["label"] == PLAIN):
        line = {"size": plain["im_size"], "speed": plain["images_per_second"], "score": plain["mean_iou"]}
        for index, label in enumerate(SHOWN):
            row = pick(rows, im_size=plain["im_size"], label=label)
            line[f"c{index}"] = gain(row, plain) + f", {row['equal']}"
        lines.append(line)
    columns = {"shorter side": "{size}", "not merged, label maps/s": "{speed:.2f}", "mIoU": "{score:.1f}"}
    return markdown(columns | {label: f"{{c{index}}}" for index, label in enumerate(SHOWN)}, lines)


def gain(row: Row, plain: Row) -> str:
    """Speed as a multiple of that of another row, and the change of mIoU."""
    ratio = row["images_per_second"] / plain["images_per_second"]
    return f"{ratio:.2f} ({row['mean_iou'] - plain['mean_iou']:+.1f})"


@table
def size_precision() -> str:
    """Plain and merged in every precision, against plain PyTorch in float32: at the same size, and at equal mIoU."""
    rows = [row for row in rows_of("size", "equal-1") if row["im_size"] in SIDES]
    plain = sorted((r for r in rows if same(r, label=PLAIN, dtype="float32")), key=lambda row: row["mean_iou"])
    lines = []
    for label, dtype in dict.fromkeys((row["label"], row["dtype"]) for row in rows):
        for one, own in (
            (row, pick(plain, im_size=row["im_size"])) for row in rows if same(row, label=label, dtype=dtype)
        ):
            cell = f"{gain(one, own)}, {times_as_fast(one, plain)}"
            lines.append({"line": f"{titled(label)}, {dtype}", "im_size": one["im_size"], "cell": cell})
    return by_column(lines, "line", "im_size", {side: str(side) for side in SIDES}, "{cell}", "method, precision")


@table
def size_test() -> str:
    """Plain and merged on the images that nothing was chosen by."""
    rows = [row for row in rows_of("size", "equal-1") if row["dtype"] == "float32" and row["im_size"] in SIDES]
    shown = [row | {"title": titled(row["label"])} for row in rows]
    text = "{test[mean_iou]:.1f} ({test[small_iou]:.1f})"
    return by_column(shown, "title", "im_size", {side: str(side) for side in SIDES}, text, "mIoU (small classes), test")


@table
def size_flat() -> str:
    """Flat windows embedded as one patch, before the first block."""
    return markdown(
        {
            "shorter side": "{im_size}",
            "windows that are one patch": "{label}",
            "GFLOPs": "{gflops:.1f}",
            "mIoU": "{mean_iou:.2f}",
            "small classes": "{small_iou:.1f}",
        },
        [
            row | {"label": titled(row["label"]).replace(" of the windows, by", ", by")}
            for row in rows_of("size", "flat-1")
        ],
    )


@table
def size_hull() -> str:
    """The settings that no others beat, and between them the plain model."""
    rows = sizes()
    places = hull([1 / row["images_per_second"] for row in rows], [row["mean_iou"] for row in rows])
    best = {id(rows[index]) for index in places}
    chosen = [row for row in rows if id(row) in best or row["label"] == PLAIN]
    shown = [
        row | {"setting": f"{row['im_size']}, {titled(row['label'])}", "on": "yes" if id(row) in best else ""}
        for row in sorted(chosen, key=lambda row: -row["images_per_second"])
    ]
    return markdown(
        {
            "shorter side, method": "{setting}",
            "on the hull": "{on}",
            "label maps/s": "{images_per_second:.2f}",
            "mIoU": "{mean_iou:.1f}",
            "small classes": "{small_iou:.1f}",
            "boundary IoU": "{boundary_iou:.1f}",
        },
        shown,
    )


@table
def size_equal() -> str:
    """Every setting against the plain model of the same mIoU."""
    rows = [row for row in sizes() if row["label"] != PLAIN and row["im_size"] != 224]
    titles = {side: str(side) for side in sorted({row["im_size"] for row in rows})}
    return by_column(rows, "label", "im_size", titles, "{equal}", "method, tokens left")


FRONT = ((336, PLAIN), (280, PLAIN), (336, "keymatch, 60 %"), (336, "algm, 60 %"), (448, "keymatch, 50 %"))


@table
def front() -> str:
    """The first table of the README."""
    rows = rows_of("size", "frontier-2")
    shown = []
    for side, label in FRONT:
        row = pick(rows, im_size=side, label=label)
        title = "not merged" if label == PLAIN else f"{label} of the tokens"
        shown.append(row | {"title": f"shorter side {side}, {title}"})
    return markdown(
        {
            "image, merging": "{title}",
            "label maps/s": "{images_per_second:.2f}",
            "mIoU": "{mean_iou:.1f}",
            "pole, sign, pedestrian, bicyclist": "{small_iou:.1f}",
            "boundary IoU": "{boundary_iou:.1f}",
        },
        shown,
    )


# ---------------------------------------------------------------------------------------------- deployed, training


@table
def deployed() -> str:
    """From a photograph to its labels."""
    rows = rows_of("deployed", "speed-1")
    names = ("512×512", "2048×1024")
    shown = [row | {f"ratio_{name}": row[name] / rows[0][name] for name in names} for row in rows]
    columns = {"model": "{name}", "precision": "{dtype}"}
    columns |= {f"{name}, photographs/s": f"{{{name}:.2f}} ({{ratio_{name}:.1f}} ×)" for name in names}
    return markdown(columns | {"mIoU": "{mean_iou:.2f}"}, shown)


TRAININGS = {
    1: "512×512, batch 4",
    2: "256×256, batch 8",
    3: "256×256, batch 8, `--amp`",
    4: "256×256, batch 8, `--compile`",
}


@table
def deployed_runtimes() -> str:
    """The model in the runtimes that people deploy on."""
    rows = rows_of("deployed", "runtimes-1")
    shown = [
        row | {"own": row["name"].removesuffix(f", {row['label']}"), "title": titled(row["label"])} for row in rows
    ]
    columns = {"runtime, precision": "{own}", "merging": "{title}", "MiB": "{size:.0f}"}
    columns |= {"images/s (ratio)": "{images_per_second:.2f} ({ratio:.2f})", "same labels, %": "{agreement:.2f}"}
    return markdown(columns | {"mIoU": "{mean_iou:.2f}"}, shown)


@table
def training() -> str:
    """Speed of training in float32."""
    return _training(1, 2)


@table
def training_options() -> str:
    """Speed of training in bfloat16, and compiled."""
    return _training(3, 4)


def _training(*numbers: int) -> str:
    rows = []
    for number in numbers:
        for row in rows_of("training", f"training-{number}"):
            tokens = "all" if row["tokens"] is None else f"{row['tokens']:.0f}"
            rows.append(row | {"setting": TRAININGS[number], "method": titled(row["method"]), "kept": tokens})
    return markdown(
        {
            "image, batch": "{setting}",
            "method": "{method}",
            "tokens": "{kept}",
            "images/s": "{images_per_second:.2f}",
            "times as fast": "{ratio:.2f}",
            "waiting for data, %": "{data_wait:.1f}",
        },
        rows,
    )


@table
def training_scale() -> str:
    """One merge and its undoing over the number of patches."""
    rows = [row for row in rows_of("training", "scale-1") if math.log2(row["patches"]) in (10, 12, 14)]
    columns = {"method": "{method}", "patches": "{patches}", "tokens left": "{tokens}"}
    columns |= {"µs per patch": "{microseconds_per_patch:.2f}", "peak KiB per patch": "{kib_per_patch:.1f}"}
    return markdown(columns, rows)


# ---------------------------------------------------------------------------------------------- machines


@table
def machines() -> str:
    """The machines, with the versions that ran on them."""
    questions = [file.stem for file in sorted(RESULTS.glob("*.json")) if file.stem != MACHINES]
    entries = [entry for question in questions for entry in _entries(question).values()]
    rows = []
    for one in known_machines():
        own = [entry for entry in entries if entry["machine"] == one["machine"]]
        dates = sorted(entry["date"] for entry in own)
        torch = sorted({entry["torch"].partition("+")[0] for entry in own})
        rows.append(one | {"torch": ", ".join(torch), "date": " to ".join(sorted({dates[0], dates[-1]}))})
    columns = {"machine": "{machine}", "processor": "{processor}", "cores": "{cores}"}
    return markdown(columns | {"instructions": "{instructions}", "torch": "{torch}", "date": "{date}"}, rows)


if __name__ == "__main__":
    main()
