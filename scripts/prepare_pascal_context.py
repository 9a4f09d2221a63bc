"""Prepares Pascal-Context (59 classes and background) below DIR.

    DIR/VOCdevkit/VOC2010/JPEGImages/*.jpg                           photographs of VOC 2010
    DIR/VOCdevkit/VOC2010/SegmentationClassContext/*.png             0: background, 1 … 59: the classes
    DIR/VOCdevkit/VOC2010/ImageSets/SegmentationContext/{train,val}.txt      4,998 and 5,105 names

Labels. mmsegmentation's PascalContextDataset has 60 classes with 0 = background and `reduce_zero_label=False`.
Its converter gets them from `trainval_merged.json` by sorting 60 of the 459 original ids and taking their rank.
PyTorch-Encoding, which published `train.pth` and `val.pth`, writes the same ranks of the same ids into them
(its training then subtracts 1). ASSUMED, from that code and not from the files: the label images hold those
ranks as they are, 0 … 59, so they are written unchanged, and any other value stops the script. Also assumed:
the keys are the image ids of `trainval_merged.json`, the file name without its underscore (2008000002 is
2008_000002.jpg); a key without a photograph stops the script.

The pickles. Unpickling runs whatever the file asks for, so `torch.load` reads them with `weights_only=True`,
an unpickler that knows only tensors and plain containers. To it we add NumPy's arrays and `PIL.Image.Image`,
the latter replaced by `LabelImage`, which takes size and bytes and calls nothing in PIL. Every other name is
refused.
"""

import pickle
import re
from pathlib import Path

import click
import numpy as np
import torch
from prepare_common import (
    Archive,
    Source,
    is_complete,
    is_empty,
    prepare_options,
    unpack,
    write_label_map,
)
from tqdm import tqdm

from segm.storage import write_text

VOC = Archive(
    "VOCtrainval_03-May-2010.tar",
    "http://host.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
    "bf9985e9f2b064752bf6bd654d89f017c76c395a",
)
ENCODING = "https://hangzh.s3.amazonaws.com/encoding/data/pcontext/"
LABELS = {
    "train": Archive("train.pth", ENCODING + "train.pth", "4bfb49e8c1cefe352df876c9b5434e655c9c1d07"),
    "val": Archive("val.pth", ENCODING + "val.pth", "ebedc94247ec616c57b9a2df15091784826a7b0c"),
}
N_CLASSES = 60
N_IMAGES = {"train": 4998, "val": 5105}

ROOT = "VOCdevkit/VOC2010"
PHOTOS = f"{ROOT}/JPEGImages"
MAPS = f"{ROOT}/SegmentationClassContext"
LISTS = f"{ROOT}/ImageSets/SegmentationContext"


class LabelImage:
    """Stands in for PIL.Image.Image while unpickling; takes its state: info, mode, size, palette, bytes, …"""

    def __setstate__(self, state: list) -> None:
        _, mode, (width, height), _, data = state[:5]
        if mode not in ("L", "P"):
            raise pickle.UnpicklingError(f"an image of mode {mode}, expected L")
        self.labels = np.frombuffer(data, np.uint8).reshape(height, width)


# NumPy 2 moved this function; a pickle names the place of the NumPy that wrote it.
RECONSTRUCT = np.zeros(1).__reduce__()[0]
SAFE = [
    (LabelImage, "PIL.Image.Image"),
    (LabelImage, "PIL.PngImagePlugin.PngImageFile"),
    (RECONSTRUCT, "numpy.core.multiarray._reconstruct"),
    (RECONSTRUCT, "numpy._core.multiarray._reconstruct"),
    np.ndarray,
    np.dtype,
    np.dtypes.UInt8DType,
]


def load_labels(path: Path) -> dict[str, np.ndarray]:
    """Label maps (H, W) uint8 by file name without suffix.

    Raises:
        click.ClickException: not such a file, or it holds anything else than label images.
    """
    try:
        with torch.serialization.safe_globals(SAFE):
            images = torch.load(path, map_location="cpu", weights_only=True)
        return {image_name(key): as_labels(image) for key, image in images.items()}
    except Exception as error:  # torch's reader raises whatever the bytes of a damaged file lead to
        raise click.ClickException(
            f"{path} refused: a dictionary of label images and nothing else is expected ({cause_of(error)})"
        ) from error


def cause_of(error: Exception) -> str:
    """The fault of a pickle, without torch's advice to switch its protection off."""
    text = " ".join(str(error).split())
    if name := re.search(r"GLOBAL ([\w.]+)", text):
        return f"it asks for {name[1]}"
    return "unreadable" if "weights_only" in text else text[:100]


def as_labels(image: LabelImage | np.ndarray) -> np.ndarray:
    labels = image.labels if isinstance(image, LabelImage) else image
    if not isinstance(labels, np.ndarray) or labels.dtype != np.uint8 or labels.ndim != 2:
        raise ValueError(f"{type(image).__name__} is no 8-bit label image")
    if labels.max(initial=0) >= N_CLASSES:
        raise ValueError(f"label {labels.max()}, expected 0 … {N_CLASSES - 1}")
    return labels


def image_name(key: int | str) -> str:
    """File name without suffix of an image id: 2008000002 and "2008_000002" give 2008_000002."""
    match = re.fullmatch(r"(\d{4})_?(\d{6})", str(key))
    if not match:
        raise ValueError(f"{key!r} is no image id such as 2008000002")
    return "_".join(match.groups())


def prepare_split(folder: Path, source: Source, split: str) -> int:
    """Write the label maps of a split, then the list, which says that all is there; number of images."""
    maps = load_labels(source.get(LABELS[split]))
    orphans = sorted(name for name in maps if is_empty(folder / PHOTOS / f"{name}.jpg"))
    if orphans:
        raise click.ClickException(f"{folder / PHOTOS} lacks {len(orphans)} photographs, e.g. {orphans[0]}.jpg")
    todo = {name: folder / MAPS / f"{name}.png" for name in sorted(maps)}
    todo = {name: target for name, target in todo.items() if is_empty(target)}
    for name, target in tqdm(todo.items(), desc=f"labels of {split}", unit="file", disable=not todo):
        write_label_map(maps[name], target)
    listed, names = folder / LISTS / f"{split}.txt", "".join(f"{name}\n" for name in sorted(maps))
    if is_empty(listed):
        write_text(listed, names)
    elif listed.read_text() != names:
        raise click.ClickException(f"{listed} exists and differs from the published list: move it away")
    return len(maps)


def has_split(folder: Path, split: str) -> bool:
    """Return whether the published number of images is listed, with photograph and label map each."""
    names = folder / LISTS / f"{split}.txt"
    if is_empty(names):
        return False
    listed = names.read_text().split()
    return len(listed) == N_IMAGES[split] and not any(
        is_empty(folder / PHOTOS / f"{name}.jpg") or is_empty(folder / MAPS / f"{name}.png") for name in listed
    )


def place(name: str) -> str | None:
    """Path below DIR of a member of the VOC archive; of VOC's own data only the photographs are used."""
    name = name.removeprefix("./")
    return name if name.startswith(f"{PHOTOS}/") else None


@click.command()
@prepare_options
def main(folder: Path, archives: tuple[Path, ...], url: str | None, check: bool) -> None:
    """Download Pascal-Context and lay it out below DIR for segm/data: VOCdevkit/VOC2010 with JPEGImages,
    SegmentationClassContext and ImageSets/SegmentationContext.

    Takes VOCtrainval_03-May-2010.tar, train.pth and val.pth; label maps have 60 classes, 0 is the background.
    What is already there is kept."""
    source = Source(folder, (VOC, *LABELS.values()), archives, url, check)
    missing = [split for split in LABELS if not has_split(folder, split)]
    if not missing:
        click.echo(f"{folder}: already complete")
        return
    if not is_complete(folder, {f"{PHOTOS}/*.jpg": sum(N_IMAGES.values())}):
        unpack(source.get(VOC), folder, place)
    for split in missing:
        click.echo(f"{folder}: {prepare_split(folder, source, split)} photographs with label maps in {split}")


if __name__ == "__main__":
    main()
