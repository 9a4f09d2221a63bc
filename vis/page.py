"""The page that compares methods: pictures, plots and numbers for the template `assets/report.html`."""

import base64
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from typing import Any, NamedTuple

import cv2
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from scipy.sparse import coo_array
from scipy.sparse.csgraph import minimum_spanning_tree

from vis import plots
from vis.labels import colorize, enlarge, magnification
from vis.tokens import fill_tokens

COLUMNS = {
    "method": "{name}",
    "mIoU": "{mean_iou:.2f}",
    "images/s": "{images_per_second:.1f}",
    "speed-up": "{speedup:.2f}",
    "GFLOPs": "{gflops:.3f}",
    "tokens": "{tokens:.1f}",
}
METHOD_COLUMNS = {
    "method": "{name}",
    "images/s": "{images_per_second:.1f}",
    "GFLOPs": "{gflops:.3f}",
    "tokens": "{tokens:.1f} of {n_patches}",
    "realized share": "{realized_share:.2f}",
}
SIDE = 512  # pixels of the larger side of a picture, at most
STEP = 0.001  # of the slider
SHOWN_CLASSES = 8

Rows = Sequence[Mapping[str, Any]]


class Picture(NamedTuple):
    """A picture of the page. uri: data URI, PNG or JPEG; ratio: width ÷ height as shown; None: that of its pixels."""

    uri: str
    caption: str
    ratio: float | None = None


def comparison_page(
    record: Mapping[str, Any],
    rows: Rows,
    classes: Sequence[str],
    logs: Mapping[str, Rows],
    pictures: tuple[Sequence[tuple[str, Any]], Sequence[str], np.ndarray],
    explored: Mapping[str, Any],
    data: Mapping[str, Mapping[str, Any]],
) -> str:
    """A comparison of methods as HTML, which loads nothing; sections without content are left out.

    Args:
        record: `dataset`, `n_images` (`mean_iou` and `cost`), `device`, `python`, `torch`, `timm`, `date`, `command`.
        rows: one dict per method: `name`, `path`, `method`, `settings`, `mean_iou` and `per_class_iou` (percent),
            `images_per_second`, `speedup`, `gflops`, `tokens`, `n_patches`, `realized_share`, `counts` (tokens of every
            image).
        classes: names of the classes.
        logs: see `vis.plots.training_curves`.
        pictures: ((name of an image, pairs of an upper and a lower `Picture`) of every image; names and palette (C, 3)
            of the classes that occur).
        explored: `name` of a model, `layer` (1-based) and `threshold` for the explorer, and its `images`: dicts of
            `name`, `photo` (H, W, 3) uint8 RGB, `right` (gh, gw-1) and `down` (gh-1, gw) float32, the similarities of
            neighboring patches, `patch_size`, pixels of the photograph per patch (height, width), and `ratio`, width ÷
            height as it is shown. The grid may be larger than the photograph at the right and bottom.
        data: name of a run -> split -> `images`, `smallest` and `largest` (width, height), `masks_counted`, `pixels` by
            class, `ignored_pixels`, `notes`.
    """
    names = [row["name"] for row in rows]
    columns = COLUMNS | {"tokens": "{tokens:.1f} of {n_patches}"}
    kept = {r["name"]: [100 * n / r["n_patches"] for n in r["counts"]] for r in rows if r["method"] != "pure"}
    blocks, shown, palette = pictures
    colors = ["#{:02x}{:02x}{:02x}".format(*map(int, color)) for color in palette]
    return _template("report.html").render(
        asset=asset,
        record=record,
        methods={
            "columns": [*COLUMNS],
            "cells": [[text.format(**row) for text in columns.values()] for row in rows],
            "settings": [(row["name"], f"{_describe(row)} — {row['path']}") for row in rows],
        },
        plots={
            "speed": plots.pareto(
                [(row["name"], row["images_per_second"], row["mean_iou"]) for row in rows], "images/s"
            ),
            "operations": plots.pareto(
                [(row["name"], row["gflops"], row["mean_iou"]) for row in rows], "GFLOPs", larger_is_better=False
            ),
            "classes": plots.class_iou(classes, {row["name"]: row["per_class_iou"] for row in rows}),
            "training": plots.training_curves(logs, names) if logs else None,
            "tokens": plots.token_shares(kept, names) if kept else None,
        },
        data={
            "rows": [[f"{name}, {split}", *_data_cells(found)] for name, split, found in _splits(data)],
            "notes": [f"{name}, {split}: {text}" for name, split, found in _splits(data) for text in found["notes"]],
        },
        pictures={"rows": blocks, "classes": list(zip(shown, colors, strict=True))},
        explorer=_explorer(**explored),
    )


def methods_page(record: Mapping[str, Any], rows: Rows, pictures: Sequence[tuple[str, Sequence[Picture]]]) -> str:
    """Methods on one model and photographs without labels as HTML, which loads nothing.

    Args:
        record: `model`, `folder`, `n_images`, `size` (height, width), `device`, `python`, `torch`, `timm`, `date`,
            `command`.
        rows: one dict per method: `name`, `method`, `options`, `images_per_second`, `gflops`, `tokens`, `n_patches`,
            `realized_share`, `cosine` (of every layer), `agreement` (share of the labels, or None).
        pictures: name of a photograph -> its pictures, side by side.
    """
    settings = [{"method": row["method"], "settings": row["options"]} for row in rows]
    return _template("methods.html").render(
        asset=asset,
        record=record,
        methods={
            "columns": [*METHOD_COLUMNS],
            "cells": [[text.format(**row) for text in METHOD_COLUMNS.values()] for row in rows],
            "settings": [(row["name"], _describe(own)) for row, own in zip(rows, settings, strict=True)],
        },
        plots={"features": plots.layer_curves({row["name"]: row["cosine"] for row in rows}, "cosine similarity")},
        moved=[(row["name"], f"{row['cosine'][-1]:.3f}", share(row["agreement"])) for row in rows],
        pictures=pictures,
    )


def share(value: float | None) -> str:
    """A share in percent; "-" for None."""
    return "-" if value is None else f"{100 * value:.1f} %"


def _template(name: str) -> Template:
    """A page in vis/assets."""
    environment = Environment(
        loader=PackageLoader(__package__, "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def asset(name: str) -> str:
    """Text of a file in vis/assets."""
    return (files(__package__) / "assets" / name).read_text(encoding="utf-8")


def _describe(row: Mapping[str, Any]) -> str:
    """A method with the settings that tell it from others."""
    hidden, usual = ("attention", "batch", "backend"), {"after": "attention", "representative": "mean"}
    given = {name: value for name, value in row["settings"].items() if name not in hidden and value is not None}
    settings = {name: value for name, value in given.items() if usual.get(name) != value}
    texts = (f"{name.replace('_', ' ')} {_plain(value)}" for name, value in settings.items())
    share = (
        [f"realized share {row['realized_share']:.2f}"] if row["method"] != "pure" and "realized_share" in row else []
    )
    return ", ".join([row["method"], *texts, *share])


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _splits(data: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str, Any]]:
    """(name of a run, split, its record), see `comparison_page`."""
    yield from ((name, split, found) for name, splits in data.items() for split, found in splits.items())


def _data_cells(found: Mapping[str, Any]) -> list[str]:
    """Images, sizes, masks, labels and ignored pixels of a split."""
    labelled = sum(found["pixels"].values())
    largest = sorted(found["pixels"].items(), key=lambda entry: -entry[1])[:SHOWN_CLASSES]
    labels = ", ".join(f"{one} {100 * count / max(labelled, 1):.1f} %" for one, count in largest)
    more = len(found["pixels"]) - len(largest)
    sizes = [f"{width}x{height}" for width, height in (found["smallest"], found["largest"])]
    ignored = found["ignored_pixels"] / max(labelled + found["ignored_pixels"], 1)
    cells = [str(found["images"]), " to ".join(dict.fromkeys(sizes)), str(found["masks_counted"])]
    return [*cells, labels + (f" and {more} more" if more else ""), f"{ignored:.1%}"]


def _explorer(name: str, layer: int, threshold: float, images: Rows) -> dict[str, Any]:
    """The threshold explorer for the template; arguments as `explored` in `comparison_page`."""
    ends = [threshold, *(end for image in images for end in _range(image["right"], image["down"]))]
    lowest, highest = math.floor(min(ends) / STEP - 0.01) * STEP, math.ceil(max(ends) / STEP) * STEP
    shown = {"name": name, "layer": layer, "threshold": threshold, "step": STEP}
    shown |= {"lowest": max(lowest, -1.0), "highest": min(highest, 1.0)}
    return shown | {"images": [_explorer_entry(image) for image in images]}


def _range(right: np.ndarray, down: np.ndarray) -> tuple[float, float]:
    """The thresholds between which the regions of an image change: below the first all patches are one region, from
    the second on each is its own. Arguments as in `comparison_page`."""
    patches = np.arange(right.shape[0] * down.shape[1]).reshape(right.shape[0], down.shape[1])
    starts, ends = (
        np.concatenate([a.ravel(), b.ravel()])
        for a, b in ((patches[:, :-1], patches[:-1]), (patches[:, 1:], patches[1:]))
    )
    similarities = np.concatenate([right.ravel(), down.ravel()]).astype(float)
    if not len(similarities):
        return 1.0, 1.0
    # The tree that joins all patches by their most similar edges: its weakest edge is the last that matters.
    tree = minimum_spanning_tree(coo_array((3 - similarities, (starts, ends)), shape=(patches.size,) * 2))
    return 3 - tree.data.max(), similarities.max()


def _explorer_entry(image: Mapping[str, Any]) -> dict[str, Any]:
    """An image for explorer.js."""
    right, down = (np.ascontiguousarray(image[key], dtype="<f4") for key in ("right", "down"))
    edges = {"right": base64.b64encode(right).decode(), "down": base64.b64encode(down).decode()}
    size = {"rows": right.shape[0], "columns": down.shape[1], "patch": list(image["patch_size"])}
    return {"name": image["name"], "photo": _uri(image["photo"]), "ratio": image["ratio"], **size, **edges}


def picture(image: np.ndarray, caption: str, *, lossless: bool = False) -> Picture:
    """A picture for the page; large ones are made smaller, small ones larger by a whole factor.

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
    return Picture(_uri(image, lossless), caption)


def label_picture(labels: np.ndarray, palette: np.ndarray, caption: str) -> Picture:
    """A label map, (H, W), in its colors; palette: (C, 3), uint8, RGB."""
    return picture(colorize(labels, palette), caption, lossless=True)


def token_picture(
    photo: np.ndarray, assignment: np.ndarray | None, grid: tuple[int, int], patch_size: tuple[int, int], caption: str
) -> Picture:
    """Tokens filled with their mean colors; photo: (H, W, 3), the others as in `vis.fill_tokens`. Without an assignment
    (None: tokens are no groups of patches) the photograph itself."""
    if assignment is None:
        return picture(photo, caption)
    factor = magnification(photo.shape[:2], SIDE // 2)  # first, so that outlines are thin compared with the patches
    sides = tuple(factor * side for side in patch_size)
    return picture(fill_tokens(enlarge(photo, factor), assignment, grid, sides), caption)


def _uri(image: np.ndarray, lossless: bool = False) -> str:
    """image: (H, W, 3), uint8, RGB -> data URI, PNG or JPEG."""
    kind, options = ("png", []) if lossless else ("jpeg", [cv2.IMWRITE_JPEG_QUALITY, 88])
    data = cv2.imencode(f".{kind}", np.ascontiguousarray(image[..., ::-1]), options)[1]
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
