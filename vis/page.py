"""A web page in one file: no network, pictures and style inside, light or dark as the reader's system is.

The functions give HTML, first the parts of any page, then the sections of a comparison of methods. What is passed as
text is escaped; only `sections`, `parts`, `figures`, `pairs` and `svg` are taken as HTML.
"""

import base64
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import cv2
import numpy as np

from vis import plots
from vis.labels import colorize, enlarge, magnification
from vis.tokens import fill_tokens

COLUMNS = {
    "method": "{name}",
    "mIoU": "{mean_iou:.2f}",
    "images/s": "{images_per_second:.1f}",
    "GFLOPs": "{gflops:.3f}",
    "tokens": "{tokens:.1f}",
    "realized share": "{realized_share:.2f}",
}
SIDE = 512  # pixels of the larger side of a picture, at most
STEP = 0.005  # of the slider
SHOWN_CLASSES = 8
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, facts: Sequence[tuple[str, str]], sections: Iterable[str]) -> str:
    """A whole document; its content security policy keeps it from loading anything.

    Args:
        title: heading.
        facts: list of (term, text) below it.
        sections: list of HTML, from `section`.
    """
    body = "\n".join(sections)
    script = f"<script>\n{asset('explorer.js')}</script>\n" if 'class="explorer"' in body else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{asset("report.css")}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{terms(facts)}
</header>
<main>
{body}
</main>
{script}</body>
</html>
"""


def asset(name: str) -> str:
    """Text of a file in vis/assets."""
    return (files("vis") / "assets" / name).read_text(encoding="utf-8")


def section(heading: str, *parts: str) -> str:
    """parts: HTML below the heading."""
    return "\n".join([f"<section>\n<h2>{escape(heading)}</h2>", *parts, "</section>"])


def terms(facts: Sequence[tuple[str, str]]) -> str:
    """facts: list of (term, text)."""
    lines = "\n".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in facts)
    return f'<dl class="facts">\n{lines}\n</dl>'


def note(text: str) -> str:
    """A paragraph that explains."""
    return f'<p class="note">{escape(text)}</p>'


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], label: str) -> str:
    """A table whose first cell in every row names it; it scrolls by itself where the page is narrow.

    Args:
        columns: headings.
        rows: lists of texts; numbers are set flush right.
        label: what it shows, for those who do not see it.
    """
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in columns)
    body = "\n".join(_table_row(row) for row in rows)
    return _scroll(f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>", label)


def _table_row(row: Sequence[str]) -> str:
    cells = "".join(f"<td>{escape(text)}</td>" for text in row[1:])
    return f'<tr><th scope="row">{escape(row[0])}</th>{cells}</tr>'


def _scroll(content: str, label: str) -> str:
    """A region that can be scrolled sideways, with the keyboard too."""
    return f'<div class="scroll" role="region" aria-label="{escape(label)}" tabindex="0">\n{content}\n</div>'


def plot(svg: str, label: str) -> str:
    """A plot of `vis.plots`; label: what it shows, for those who do not see it."""
    drawing = svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
    return f'<figure class="plot">{_scroll(drawing, label)}</figure>'


def beside(*figures: str) -> str:
    """Plots side by side where there is room."""
    return '<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def picture(image: np.ndarray, caption: str, *, lossless: bool = False) -> str:
    """A picture with a caption below; large ones are made smaller, small ones larger by a whole factor.

    Args:
        image: (H, W, 3), uint8, RGB.
        caption: text.
        lossless: PNG without mixing colors (label maps) instead of JPEG (photographs).
    """
    image = enlarge(image, magnification(image.shape[:2], SIDE // 2))
    factor = SIDE / max(image.shape[:2])
    if factor < 1:
        mixing = cv2.INTER_NEAREST if lossless else cv2.INTER_AREA
        image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=mixing)
    text = escape(caption)
    return f'<figure><img src="{picture_uri(image, lossless)}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def label_picture(labels: np.ndarray, palette: np.ndarray, caption: str) -> str:
    """A label map, (H, W), in its colors; palette: (C, 3), uint8, RGB."""
    return picture(colorize(labels, palette), caption, lossless=True)


def token_picture(
    photo: np.ndarray, assignment: np.ndarray | None, grid: tuple[int, int], patch_size: tuple[int, int], caption: str
) -> str:
    """Tokens filled with their mean colors; photo: (H, W, 3), the others as in `vis.fill_tokens`. Without an assignment
    (None: tokens are no groups of patches) the photograph itself."""
    if assignment is None:
        return picture(photo, caption)
    factor = magnification(photo.shape[:2], SIDE // 2)  # first, so that outlines are thin beside the patches
    sides = tuple(factor * side for side in patch_size)
    return picture(fill_tokens(enlarge(photo, factor), assignment, grid, sides), caption)


def picture_uri(image: np.ndarray, lossless: bool = False) -> str:
    """image: (H, W, 3), uint8, RGB -> data URI, PNG or JPEG."""
    kind, options = ("png", []) if lossless else ("jpeg", [cv2.IMWRITE_JPEG_QUALITY, 88])
    data = cv2.imencode(f".{kind}", np.ascontiguousarray(image[..., ::-1]), options)[1]
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture_pairs(heading: str, pairs: Sequence[tuple[str, str]]) -> str:
    """Pictures in two rows.

    Args:
        heading: what they are of.
        pairs: HTML of the upper and the lower picture of every column, from `picture`.
    """
    inner = "\n".join(figure for pair in pairs for figure in pair)
    return f"<h3>{escape(heading)}</h3>\n" + _scroll(f'<div class="pictures">\n{inner}\n</div>', heading)


def class_list(names: Sequence[str], palette: np.ndarray) -> str:
    """Class names beside their colors; palette: (C, 3), uint8, RGB."""
    colors = ("#{:02x}{:02x}{:02x}".format(*map(int, color)) for color in palette)
    items = (
        f'<li><span style="background:{color}"></span>{escape(name)}</li>'
        for name, color in zip(names, colors, strict=True)
    )
    return '<ul class="classes">' + "".join(items) + "</ul>"


def explorer(images: Sequence[Mapping[str, Any]], threshold: float) -> str:
    """Photographs over which merged regions follow a threshold that the reader moves.

    Args:
        images: list of dicts of `name`, `photo` (H, W, 3) uint8 RGB, `right` (gh, gw-1) and `down` (gh-1, gw) float32,
            the similarities of neighboring patches, and `patch_size`, pixels of the photograph per patch (height,
            width). The grid may be larger than the photograph at the right and bottom.
        threshold: where the slider stands at first.
    """
    similarities = np.concatenate([image[key].ravel() for image in images for key in ("right", "down")])
    lowest = math.floor((float(similarities.min(initial=1)) - 1e-6) / STEP) * STEP  # here all patches are one region
    data = {"threshold": threshold, "images": [_explorer_entry(image) for image in images]}
    content = json.dumps(data).replace("<", "\\u003c")
    options = "".join(f'<option value="{i}">{escape(image["name"])}</option>' for i, image in enumerate(images))
    slider = f'min="{lowest:.3f}" max="1" step="{STEP}" value="{threshold}"'
    return f"""<div class="explorer">
<div class="controls">
<label class="threshold">Threshold τ <input type="range" {slider}>
<input type="number" min="-1" max="1" step="{STEP}" value="{threshold}" aria-label="Threshold τ as a number"></label>
<label>Image <select autocomplete="off">{options}</select></label>
<label><input type="checkbox" autocomplete="off"> Fill regions with their mean color</label>
</div>
<output aria-live="polite"></output>
<canvas role="img" width="1" height="1"></canvas>
<noscript><p>The explorer needs JavaScript.</p></noscript>
<script type="application/json">{content}</script>
</div>"""


def _explorer_entry(image: Mapping[str, Any]) -> dict[str, Any]:
    """What explorer.js reads of one image."""
    right, down = (np.ascontiguousarray(image[key], dtype="<f4") for key in ("right", "down"))
    edges = {"right": base64.b64encode(right).decode(), "down": base64.b64encode(down).decode()}
    size = {"rows": right.shape[0], "columns": down.shape[1], "patch": list(image["patch_size"])}
    return {"name": image["name"], "photo": picture_uri(image["photo"]), **size, **edges}


def comparison_page(
    record: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    classes: Sequence[str],
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    pictures: tuple[Sequence[str], Sequence[str], np.ndarray],
    explored: Mapping[str, Any],
    data: Mapping[str, Mapping[str, Any]],
) -> str:
    """A comparison of methods.

    Args:
        record: `dataset`, `n_images` (`mean_iou` and `cost`), `device`, `python`, `torch`, `timm`, `date`, `command`.
        rows: see `methods_section`, `classes_section`, `tokens_section`.
        classes: names of the classes.
        logs: see `training_section`.
        pictures: (blocks, names, palette), see `pictures_section`.
        explored: see `explorer_section`.
        data: see `data_section`.
    """
    counts = f"{record['n_images']['mean_iou']} images for the mIoU, {record['n_images']['cost']} for the rest"
    versions = f"Python {record['python']}, PyTorch {record['torch']}, timm {record['timm']}"
    facts = [("data set", f"{record['dataset']}, {counts}"), ("device", record["device"]), ("versions", versions)]
    facts += [("date", record["date"]), ("command", record["command"])]
    sections = [
        methods_section(rows),
        trade_off_section(rows),
        classes_section(rows, classes),
        data_section(data),
        training_section(logs, [row["name"] for row in rows]),
        tokens_section(rows),
        pictures_section(*pictures),
        explorer_section(**explored),
    ]
    return page(f"Token reduction on {record['dataset']}", facts, filter(None, sections))


def methods_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of methods, and what they are.

    Args:
        rows: one dict per method: `name`, `path`, `method`, `settings`, `mean_iou` (percent), `images_per_second`,
            `gflops`, `tokens`, `n_patches`, `realized_share`.
    """
    explained = (
        "mIoU in percent; images/s of the label map at batch size 1, over all images; GFLOPs (one per multiply-add, "
        "upsampling included) and tokens left of the patches, means over images. Realized share: (speed merged ÷ speed "
        "pure) ÷ (GFLOPs pure ÷ GFLOPs merged) of encoder and decoder, without upsampling; 1 means that every "
        "operation saved became time saved."
    )
    columns = COLUMNS | {"tokens": "{tokens:.1f} of {n_patches}"}
    cells = [[text.format(**row) for text in columns.values()] for row in rows]
    merging = [(row["name"], f"{_describe(row)} — {row['path']}") for row in rows]
    return section("Methods", table([*COLUMNS], cells, "Methods"), note(explained), terms(merging))


def _describe(row: Mapping[str, Any]) -> str:
    """A method with the settings that tell it from others."""
    hidden = ("attention", "batch", "backend")
    settings = {name: value for name, value in row["settings"].items() if name not in hidden and value is not None}
    texts = (f"{name.replace('_', ' ')} {_plain(value)}" for name, value in settings.items())
    return ", ".join([row["method"], *texts])


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def trade_off_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """mIoU over speed and over operations; rows: as in `methods_section`."""
    figures = []
    for key, label, larger in (("images_per_second", "images/s", True), ("gflops", "GFLOPs", False)):
        points = [(row["name"], row[key], row["mean_iou"]) for row in rows]
        words = "; ".join(f"{name}: {score:.2f} % at {x:.3g} {label}" for name, x, score in points)
        svg = plots.pareto(points, label, larger_is_better=larger)
        figures.append(plot(svg, f"mIoU over {label}. {words}"))
    return section("mIoU over speed and operations", beside(*figures))


def classes_section(rows: Sequence[Mapping[str, Any]], classes: Sequence[str]) -> str:
    """IoU per class; rows: with `name` and `per_class_iou` (percent), classes: their names."""
    svg = plots.class_iou(classes, {row["name"]: row["per_class_iou"] for row in rows})
    label = f"IoU of {len(classes)} classes by method; the numbers are in the JSON file beside this page"
    return section("IoU per class", plot(svg, label))


def data_section(data: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What trainings found when they looked at their data; None if none did.

    Args:
        data: name of a run -> split -> `images`, `smallest` and `largest` (width, height), `masks_counted`, `pixels` by
            class, `ignored_pixels`, `notes`.
    """
    columns = ("run, split", "images", "pixels", "masks counted", "labels", "ignored")
    rows, notes = [], []
    for name, splits in data.items():
        for split, found in splits.items():
            labelled = sum(found["pixels"].values())
            largest = sorted(found["pixels"].items(), key=lambda entry: -entry[1])[:SHOWN_CLASSES]
            labels = ", ".join(f"{one} {100 * count / max(labelled, 1):.1f} %" for one, count in largest)
            more = len(found["pixels"]) - len(largest)
            sizes = [f"{width}x{height}" for width, height in (found["smallest"], found["largest"])]
            ignored = found["ignored_pixels"] / max(labelled + found["ignored_pixels"], 1)
            cells = [f"{name}, {split}", str(found["images"]), " to ".join(dict.fromkeys(sizes))]
            cells += [str(found["masks_counted"]), labels + (f" and {more} more" if more else ""), f"{ignored:.1%}"]
            rows.append(cells)
            notes += [note(f"{name}, {split}: {text}") for text in found["notes"]]
    return section("Data", table(columns, rows, "Data"), *notes) if rows else None


def training_section(logs: Mapping[str, Sequence[Mapping[str, Any]]], names: Sequence[str]) -> str | None:
    """Training curves, see `vis.plots.training_curves`; None if there are none."""
    if not logs:
        return None
    return section("Training", plot(plots.training_curves(logs, names), f"Training curves of {', '.join(logs)}"))


def tokens_section(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Histograms of what images keep; None if nothing merges.

    Args:
        rows: with `name`, `method`, `n_patches` and `counts`, the tokens of every image.
    """
    merging = [row for row in rows if row["method"] != "pure"]
    if not merging:
        return None
    shares = {row["name"]: [100 * count / row["n_patches"] for count in row["counts"]] for row in merging}
    words = "; ".join(f"{name}: {np.mean(values):.1f} %" for name, values in shares.items())
    svg = plots.token_shares(shares, [row["name"] for row in rows])
    return section("Tokens per image", plot(svg, f"Tokens left on average. {words}"))


def pictures_section(blocks: Sequence[str], names: Sequence[str], palette: np.ndarray) -> str | None:
    """Pictures below the colors of their classes; None without pictures.

    Args:
        blocks: list of HTML, from `picture_pairs`.
        names, palette: of the classes that occur.
    """
    explained = "Images resized to the crop of the training. Black: not labelled."
    return section("Pictures", note(explained), class_list(names, palette), *blocks) if blocks else None


def explorer_section(name: str, layer: int, threshold: float, images: Sequence[Mapping[str, Any]]) -> str | None:
    """The threshold explorer; None without images.

    Args:
        name: of the model.
        layer: 1-based.
        threshold, images: as in `explorer`.
    """
    explained = (
        f"What graph merging does in layer {layer} of {name}: neighboring patches whose cosine similarity exceeds τ "
        "become one token, and so does every connected group of them."
    )
    return section("Threshold explorer", note(explained), explorer(images, threshold)) if images else None
