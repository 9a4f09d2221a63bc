"""Look into a trained Segmenter: attention, merged tokens and label maps of one photograph."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import cv2
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import patch
from segm.cli import POSITIVE, Sides, checkpoint_argument, device_option
from segm.data import DATASETS, class_info
from segm.data.images import resize_to
from segm.merging import MergingCommand, assignment_of
from segm.model.segmenter import Segmenter
from segm.run import Run
from segm.sizes import Size, pair
from segm.storage import write_picture
from vis import attention_pictures, enlarge, label_picture, magnification, similarity_map, token_pictures

LISTS = tuple(name for name in DATASETS if name != "folder")  # data sets whose classes are known without a file


class Query(NamedTuple):
    """A token that attends: name of its files, row in the attention weights, index of its patch (None: no patch)."""

    name: str
    row: int
    patch: int | None = None


@click.command(cls=MergingCommand)
@checkpoint_argument
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("cmap", required=False)
@click.option(
    "--cls/--patch",
    default=None,
    help="Draw the attention of CLS (in the decoder: of classes), or of one patch.  [default: cls; patch where one is "
    "chosen, or where the encoder has no CLS]",
)
@click.option("--x-patch", type=int, help="Column of the patch, counted from 0.  [default: the middle]")
@click.option("--y-patch", type=int, help="Row of the patch, counted from 0.  [default: the middle]")
@click.option("--enc/--dec", default=True, help="Draw the attention of the encoder, or of the decoder.")
@click.option(
    "--layer-id",
    type=int,
    help="Layer, counted from 0, unlike --selected-layer: its attention, and the tokens that it leaves.  [default: "
    "the last]",
)
@click.option(
    "--class",
    "classes",
    multiple=True,
    help="Name of a class that attends, with --dec; may be repeated.  [default: every class in the prediction]",
)
@click.option(
    "--similarity-window",
    cls=Sides,
    help="Also draw how similar the tokens in each window of so many patches are after the attention of the layer, "
    "without merging (CLAP merges windows of 2).  [default: none]",
)
@click.option(
    "--image-size",
    type=POSITIVE,
    help="Side of the square that the photograph is resized to, pixels.  [default: the crop of the training]",
)
@click.option(
    "--ground-truth",
    type=click.Path(path_type=Path),
    help="File of the true label map.  [default: that of IMAGE in its data set, if there is one]",
)
@device_option
@torch.inference_mode()
def main(
    checkpoint: Path,
    image: Path,
    out: Path,
    cmap: str | None,
    cls: bool | None,
    x_patch: int | None,
    y_patch: int | None,
    enc: bool,
    layer_id: int | None,
    classes: tuple[str, ...],
    similarity_window: Size | None,
    image_size: int | None,
    ground_truth: Path | None,
    **how: Any,
) -> None:
    """Draw attention, merged tokens and labels of CHECKPOINT on the photograph IMAGE, in OUT/<name of IMAGE>.

    CMAP gives names and colors of the classes: a data set, or a YAML list of {id, name, color: [r, g, b]}; by default
    the data set of the training. Small pictures are enlarged by a whole factor.
    """
    check_query(cls, x_patch, y_patch, enc, classes)
    if similarity_window and not enc:
        raise ValueError("--similarity-window: tokens are compared in the encoder, leave out --dec")
    run = Run.load(checkpoint, amp=False, **how)
    model, (names, palette) = run.model, read_class_list(cmap, run)
    from segm.data.files import read_sample  # imports mmseg

    listed, values = cmap if cmap in LISTS else run.dataset, run.config.data.value_range
    sample = read_sample(image, ground_truth, listed, names, palette, values, run.bands)
    size = pair(image_size or run.crop_size)
    photo, view = resize_to(sample.photo, size), run.preprocess_resized(sample.image, size)
    grid = model.grid(size)

    part = "encoder" if enc else "decoder"
    layer_id = chosen_layer(model, part, layer_id)
    place = chosen_place(model, enc, grid, cls, x_patch, y_patch)
    window = pair(similarity_window) if similarity_window else None
    alike = None if window is None else similarities_in(run, view, layer_id, window)
    weights, before, after = look(model, view, layer_id, part, grid)
    label_maps = {"pred": model.predict(view)[0].cpu().numpy()}
    if sample.label is not None:
        label_maps["gt"] = cv2.resize(sample.label, size[::-1], interpolation=cv2.INTER_NEAREST)
    joined = model.queries_in(layer_id) if enc else 0  # in front of CLS
    first = joined + model.encoder.num_prefix_tokens if enc else 0
    n_tokens = weights.shape[-1] - (first if enc else model.n_cls)  # that carry patches
    if before is None:
        queries = []  # the tokens that this layer sees are no groups of patches: attention has no place to be drawn at
    elif place is not None:
        index = place[1] * grid[1] + place[0]
        queries = [Query("patch_{}_{}".format(*place), first + before[index], index)]
    else:
        queries = [Query("cls", joined)] if enc else class_queries(names, classes, label_maps["pred"], n_tokens)

    factor = magnification(photo.shape[:2])
    photo, patch_size = enlarge(photo, factor), tuple(factor * length for length in model.patch_size)
    folder, layer = out / image.stem, f"{part[:3]}_layer{layer_id}"
    for query in tqdm(queries, desc="attention", unit="query", leave=False):
        for head, row in enumerate(weights[:, query.row, first : first + n_tokens]):
            pictures = attention_pictures(photo, row, grid, patch_size, before, query.patch)
            for picture, end in zip(pictures, ("", "_overlay"), strict=True):
                write_picture(folder / layer / query.name / f"{layer}_attn-head{head}_{query.name}{end}.png", picture)
    tokens = {"photo": photo} if after is None else token_pictures(photo, after, grid, patch_size)
    if window is not None:
        tokens["{}_similarity_{}x{}".format(layer, *window)] = similarity_map(alike, window)
    for name, picture in tokens.items():
        write_picture(folder / f"{image.stem}_{name}.png", picture)
    for name, labels in label_maps.items():
        picture = label_picture(enlarge(labels, factor), names, palette)
        write_picture(folder / f"{image.stem}_seg_{name}.png", picture)
    what = ", ".join(query.name for query in queries) or f"no picture, tokens of {run.method} are no groups of patches"
    truth = "" if sample.label is not None else "; no ground truth found"
    click.echo(f"{layer}: attention of {what}, written to {folder}{truth}")


def look(
    model: Segmenter, view: Tensor, layer_id: int, part: str, grid: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Attention of one layer, and which token carries which patch before and after it.

    Args:
        model: patched or not.
        view: (1, 3, H, W), normalized.
        layer_id, part: see `Segmenter.attention`.
        grid: (gh, gw).

    Returns:
        (weights (heads, L, L), assignment (N,) of the tokens that attend, assignment (N,) after that layer), arrays; an
        assignment is None where tokens are no groups of patches. The decoder has those of the whole encoder.
    """
    weights = model.attention(view, layer_id, part)
    steps = sorted(patch.reductions(model).items())
    after = [step for step in steps if part == "decoder" or step[0] <= layer_id + 1]  # those count from 1
    # Most methods merge after the attention of their layer, which sees what the layers before it left.
    first = patch.is_patched(model) and patch.find(patch.method(model)).place == "before"
    before = after if first else [step for step in after if part == "decoder" or step[0] <= layer_id]
    return weights[0].float().cpu().numpy(), last_assignment(before, grid), last_assignment(after, grid)


def similarities_in(run: Run, view: Tensor, layer_id: int, window: tuple[int, int]) -> np.ndarray:
    """Mean cosine similarity of the tokens in every whole window after the attention of a layer, without merging.

    CLAP of ALGM (section 3.2) merges the windows in which it is at least the threshold.

    Args:
        view: (1, 3, H, W), normalized.
        layer_id: 0-based.
        window: patches, (height, width).

    Returns:
        (gh // height, gw // width), float32.

    Raises:
        ValueError: a window that does not fit into the image.
    """
    model, layer = run.unpatched().model, layer_id + 1
    grid = model.grid(view.shape[-2:])
    with patch.tokens(model.encoder, [layer]) as tokens:
        model.network(view)
    found = patch.window_similarities(tokens[layer], grid, window)
    return found[0].view(*(side // length for side, length in zip(grid, window, strict=True))).float().cpu().numpy()


def last_assignment(steps: Sequence[tuple[int, patch.Reduction]], grid: tuple[int, int]) -> np.ndarray | None:
    """(N,), of the last of [(layer, composed reduction), ...]; every patch is a token of its own if there is none."""
    if not steps:
        return np.arange(grid[0] * grid[1])
    return assignment_of(steps[-1][1])


def check_query(cls: bool | None, x_patch: int | None, y_patch: int | None, enc: bool, classes: Sequence[str]) -> None:
    """Raise a ValueError for options that contradict each other."""
    place = [f"--{axis}-patch {value}" for axis, value in (("x", x_patch), ("y", y_patch)) if value is not None]
    if cls and place:
        raise ValueError(f"{' '.join(place)}: this chooses a patch, give --patch instead of --cls")
    if classes and enc:
        raise ValueError(f"--class {classes[0]}: only the decoder has classes, add --dec")
    if classes and (place or cls is False):
        raise ValueError(f"--class {classes[0]} and {' '.join(place) or '--patch'}: choose classes or a patch")


def chosen_layer(model: Segmenter, part: str, layer_id: int | None) -> int:
    """The layer, by default the last; ValueError if there is none of that number."""
    depth = len(getattr(model, part).blocks)
    if not depth:
        raise ValueError(f"the {part} of this model has no attention: give --enc")
    if layer_id is not None and not 0 <= layer_id < depth:
        raise ValueError(f"--layer-id {layer_id}: the {part} has layers 0 to {depth - 1}, counted from 0")
    return depth - 1 if layer_id is None else layer_id


def chosen_place(
    model: Segmenter, enc: bool, grid: tuple[int, int], cls: bool | None, x_patch: int | None, y_patch: int | None
) -> tuple[int, int] | None:
    """(column, row) of the patch that attends; None: CLS or classes do. ValueError: outside the grid, or no CLS."""
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


def class_queries(names: Sequence[str], chosen: Sequence[str], prediction: np.ndarray, first: int) -> list[Query]:
    """A `Query` for every chosen class, or else for every class in the prediction; first: row of the first class.

    Raises:
        ValueError: an unknown class.
    """
    unknown = next((name for name in chosen if name not in names), None)
    if unknown is not None:
        raise ValueError(f"--class {unknown}: there is no such class, choose from {', '.join(names)}")
    labels = [names.index(name) for name in dict.fromkeys(chosen)] or np.unique(prediction)
    return [Query(f"cls_{names[label].replace('/', '-')}", first + label) for label in labels]


def read_class_list(cmap: str | None, run: Run) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and palette, (C, 3) uint8 RGB, from a data set, a YAML file, or (None) the data set of the run.

    Raises:
        ValueError: neither a data set nor a file, or another number of classes than the model's.
    """
    if cmap is None or cmap == "folder" == run.dataset:
        names, palette = run.classes, run.palette
    elif cmap in LISTS:
        names, palette = class_info(cmap)
    elif Path(cmap).is_file():
        names, palette = class_info("folder", cmap)
    else:
        raise ValueError(f"CMAP {cmap}: give a data set ({', '.join(LISTS)}) or a YAML file with a list of classes")
    if len(names) != run.n_cls:
        raise ValueError(
            f"CMAP {cmap or run.dataset} has {len(names)} classes, the model {run.n_cls}: give that of the training"
        )
    return tuple(names), palette


if __name__ == "__main__":
    main()
