"""Look into a trained Segmenter: attention, merged tokens and label maps of one photograph."""

from pathlib import Path
from typing import NamedTuple

import click
import cv2
import numpy as np
import torch
from tqdm import tqdm

import patch
from segm.data import DATASETS, class_info, normalize
from segm.eval.runs import class_colors, run_normalization, trained_on
from segm.options import Command, checkpoint_argument, device_option, load_patched, patch_options
from segm.pictures import write_picture
from vis import attention_pictures, enlarge, label_picture, magnification, token_pictures

LISTS = tuple(name for name in DATASETS if name != "folder")  # data sets whose classes are known without a file


class Query(NamedTuple):
    """What attends. name: that of its files; row: in the attention weights; patch: its index, None for others."""

    name: str
    row: int
    patch: int | None = None


@click.command(cls=Command)
@checkpoint_argument
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("cmap", required=False)
@click.option(
    "--cls/--patch",
    default=None,
    help="What attends: CLS (in the decoder: classes), or one patch.  [default: cls; patch where one is chosen, or "
    "where the encoder has no CLS]",
)
@click.option("--x-patch", type=int, help="Column of the patch, counted from 0.  [default: the middle]")
@click.option("--y-patch", type=int, help="Row of the patch, counted from 0.  [default: the middle]")
@click.option("--enc/--dec", default=True, show_default=True, help="Attention of the encoder or of the decoder.")
@click.option("--layer-id", type=int, help="Layer, counted from 0, unlike --selected-layer.  [default: the last]")
@click.option(
    "--class",
    "classes",
    multiple=True,
    help="With --dec: name of a class that attends; may be repeated.  [default: every class in the prediction]",
)
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    help="Pixels per side to which the photograph is resized, ratio not kept.  [default: the crop of the training]",
)
@click.option(
    "--ground-truth",
    type=click.Path(path_type=Path),
    help="True label map.  [default: where the data set keeps that of IMAGE; none if nothing is there]",
)
@device_option
@patch_options
@torch.inference_mode()
def main(
    checkpoint,
    image,
    out,
    cmap,
    cls,
    x_patch,
    y_patch,
    enc,
    layer_id,
    classes,
    image_size,
    ground_truth,
    device,
    **given,
):
    """Draw what CHECKPOINT, a file or a run directory, does with the photograph IMAGE; goes to OUT/<name of IMAGE>.

    CMAP gives names and colors of the classes: a data set, or a YAML list of {id, name, color: [r, g, b]}; by default
    the data set of the training. Small pictures are enlarged by a whole factor.
    """
    check_query(cls, x_patch, y_patch, enc, classes)
    model, variant = load_patched(checkpoint, given, device)
    names, palette = read_class_list(cmap, variant, model.n_cls)
    from segm.data.photograph import read_sample  # imports mmseg

    sample = read_sample(image, ground_truth, cmap if cmap in LISTS else trained_on(variant), names, palette)
    side = image_size or variant.get("dataset_kwargs", {}).get("crop_size") or model.encoder.patch_embed.img_size[0]
    photo = cv2.resize(sample.image, (side, side), interpolation=cv2.INTER_LINEAR)
    view = normalize(photo, run_normalization(variant)).unsqueeze(0).to(device)
    grid = tuple(-(-side // length) for length in model.patch_size)

    part = "encoder" if enc else "decoder"
    layer_id = chosen_layer(model, part, layer_id)
    place = chosen_place(model, enc, grid, cls, x_patch, y_patch)
    weights, before, final = look(model, view, layer_id, part, grid)
    label_maps = {"pred": model.predict(view)[0].cpu().numpy()}
    if sample.label is not None:
        label_maps["gt"] = cv2.resize(sample.label, (side, side), interpolation=cv2.INTER_NEAREST)
    first = model.encoder.num_prefix_tokens if enc else 0
    n_tokens = weights.shape[-1] - (first if enc else model.n_cls)  # that carry patches
    if place is not None:
        index = place[1] * grid[1] + place[0]
        queries = [Query("patch_{}_{}".format(*place), first + before[index], index)]
    else:
        queries = [Query("cls", 0)] if enc else class_queries(names, classes, label_maps["pred"], n_tokens)

    factor = magnification(photo.shape[:2])
    photo, patch_size = enlarge(photo, factor), tuple(factor * length for length in model.patch_size)
    folder, layer = out / image.stem, f"{part[:3]}_layer{layer_id}"
    for query in tqdm(queries, desc="attention", unit="query", leave=False):
        for head, row in enumerate(weights[:, query.row, first : first + n_tokens]):
            pictures = attention_pictures(photo, row, grid, patch_size, before, query.patch)
            for picture, end in zip(pictures, ("", "_overlay"), strict=True):
                write_picture(folder / layer / query.name / f"{layer}_attn-head{head}_{query.name}{end}.png", picture)
    for name, picture in token_pictures(photo, final, grid, patch_size).items():
        write_picture(folder / f"{image.stem}_{name}.png", picture)
    for name, labels in label_maps.items():
        picture = label_picture(enlarge(labels, factor), names, palette)
        write_picture(folder / f"{image.stem}_seg_{name}.png", picture)
    truth = "" if sample.label is not None else "; no ground truth found"
    click.echo(f"{layer}: attention of {', '.join(query.name for query in queries)}, written to {folder}{truth}")


def look(model, view, layer_id, part, grid):
    """Attention of one layer, and which token carries which patch.

    Args:
        model: a Segmenter, patched or not.
        view: (1, 3, H, W), normalised.
        layer_id, part: see `Segmenter.attention`.
        grid: (gh, gw).

    Returns:
        (weights (heads, L, L), assignment (N,) at the input of that layer, assignment (N,) in the end), arrays.

    Raises:
        ValueError: a method that assigns no patches to tokens.
    """
    with patch.reductions(model) as steps:
        weights = model.attention(view, layer_id, part)
    # Layers merge behind their attention: layer_id + 1, counted from 1, sees what the layers before it left.
    steps = sorted(steps.items())
    before = [step for step in steps if part == "decoder" or step[0] <= layer_id]
    return weights[0].float().cpu().numpy(), last_assignment(before, grid), last_assignment(steps, grid)


def last_assignment(steps, grid):
    """(N,), of the last of [(layer, composed reduction), ...]; every patch is a token of its own if there is none."""
    if not steps:
        return np.arange(grid[0] * grid[1])
    if steps[-1][1].assignment is None:
        raise ValueError(
            "this merging method assigns no patches to tokens, nothing can be drawn: try --patch-type pure"
        )
    return steps[-1][1].assignment[0].cpu().numpy()


def check_query(cls, x_patch, y_patch, enc, classes):
    """Raise a ValueError for options that contradict each other."""
    place = [f"--{axis}-patch {value}" for axis, value in (("x", x_patch), ("y", y_patch)) if value is not None]
    if cls and place:
        raise ValueError(f"{' '.join(place)}: this chooses a patch, give --patch instead of --cls")
    if classes and enc:
        raise ValueError(f"--class {classes[0]}: only the decoder has classes, add --dec")
    if classes and (place or cls is False):
        raise ValueError(f"--class {classes[0]} and {' '.join(place) or '--patch'}: choose classes or a patch")


def chosen_layer(model, part, layer_id):
    """The layer, by default the last; ValueError if there is none of that number."""
    depth = len(getattr(model, part).blocks)
    if not depth:
        raise ValueError(f"the {part} of this model has no attention: give --enc")
    if layer_id is not None and not 0 <= layer_id < depth:
        raise ValueError(f"--layer-id {layer_id}: the {part} has layers 0 to {depth - 1}, counted from 0")
    return depth - 1 if layer_id is None else layer_id


def chosen_place(model, enc, grid, cls, x_patch, y_patch):
    """(column, row) of the patch that attends; None: CLS or classes do.

    Raises:
        ValueError: a patch outside the grid, or an encoder without CLS.
    """
    has_cls = not enc or model.encoder.cls_token is not None
    if cls and not has_cls:
        raise ValueError("--cls: the encoder of this model has no CLS token, give --patch")
    if has_cls and cls is not False and x_patch is None and y_patch is None:
        return None
    place = (grid[1] // 2 if x_patch is None else x_patch, grid[0] // 2 if y_patch is None else y_patch)
    for axis, position, count, kind in zip("xy", place, grid[::-1], ("columns", "rows"), strict=True):
        if not 0 <= position < count:
            raise ValueError(f"--{axis}-patch {position}: the grid has {kind} 0 to {count - 1}")
    return place


def class_queries(names, chosen, prediction, first):
    """A `Query` for every chosen class, or else for every class in the prediction; first: row of the first class.

    Raises:
        ValueError: an unknown class.
    """
    unknown = next((name for name in chosen if name not in names), None)
    if unknown is not None:
        raise ValueError(f"--class {unknown}: there is no such class, choose from {', '.join(names)}")
    labels = [names.index(name) for name in dict.fromkeys(chosen)] or np.unique(prediction)
    return [Query(f"cls_{names[label].replace('/', '-')}", first + label) for label in labels]


def read_class_list(cmap, variant, n_cls):
    """Class names and palette, (C, 3) uint8 RGB, from a data set, a YAML file, or (None) the data set of the run.

    Raises:
        ValueError: neither a data set nor a file, or another number of classes than the model's.
    """
    if cmap is None or cmap == "folder" == trained_on(variant):
        names, palette = class_colors(variant)
    elif cmap in LISTS:
        names, palette = class_info(cmap)
    elif Path(cmap).is_file():
        names, palette = class_info("folder", cmap)
    else:
        raise ValueError(f"CMAP {cmap}: give a data set ({', '.join(LISTS)}) or a YAML file with a list of classes")
    if len(names) != n_cls:
        raise ValueError(
            f"CMAP {cmap or trained_on(variant)} has {len(names)} classes, the model {n_cls}: give that of the training"
        )
    return tuple(names), palette


if __name__ == "__main__":
    main()
