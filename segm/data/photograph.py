"""One photograph, with its label map where a data set keeps that."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from segm.data.files import FileDataset
from segm.data.layouts import LAYOUTS
from segm.data.openmmlab import BaseSegDataset
from segm.data.public import mmseg_class
from segm.data.sample import Sample


def read_sample(image: Path, label: Path | None, dataset: str, names: Sequence[str], palette: np.ndarray) -> Sample:
    """A photograph with its label map, read as the data set reads its own: ADE20K's 0 is ignored, the rest shifts.

    Args:
        image: file.
        label: file, or None: where the data set keeps it, if it is there.
        dataset: name of a data set; names, palette: its classes, for the user's own files.

    Returns:
        A `Sample`, its label None if there is none.

    Raises:
        FileNotFoundError, ValueError: a file that is missing, damaged or does not fit.
    """
    common = {"data_prefix": {"img_path": str(image.parent)}, "lazy_init": True, "serialize_data": False}
    if dataset in LAYOUTS:
        files = mmseg_class(dataset)(**common, **LAYOUTS[dataset].options)
    else:
        files = BaseSegDataset(**common, metainfo={"classes": names, "palette": palette})
    label = label or find_label(image, dataset, files)
    info = {"img_path": str(image), "label_map": files.label_map, "reduce_zero_label": files.reduce_zero_label}
    info |= {"seg_fields": []} | ({} if label is None else {"seg_map_path": str(label)})
    files.load_data_list = lambda: [info]  # instead of everything that lies beside the photograph
    files.full_init()
    settings = {"image_size": 1, "crop_size": 1, "resize_factor": 1, "normalization": "vit", "seed": 0}
    return FileDataset(files, dataset, "val", **settings).load(0)


def find_label(image: Path, dataset: str, files: BaseSegDataset) -> Path | None:
    """Where a data set keeps the label map of a photograph, or None if no file is there."""
    splits = LAYOUTS[dataset].splits.values() if dataset in LAYOUTS else ()
    folders = {split.images.split("/")[0]: split.labels.split("/")[0] for split in splits if split.labels}
    folders = folders or {"images": "annotations"}
    for own, other in folders.items():
        parts = list(image.absolute().parent.parts)
        if own in parts:
            parts[len(parts) - 1 - parts[::-1].index(own)] = other
            name = image.name.removesuffix(files.img_suffix) if image.name.endswith(files.img_suffix) else image.stem
            label = Path(*parts) / (name + files.seg_map_suffix)
            return label if label.is_file() else None
    return None
