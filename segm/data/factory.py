"""From a data set's name to the data set."""

from pathlib import Path
from typing import Any

import numpy as np

from segm.data.dataset import SegmentationDataset
from segm.data.defaults import dataset_defaults
from segm.data.layouts import dataset_root
from segm.sizes import Size


def create_dataset(
    name: str,
    split: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    crop_size: Size | None = None,
    normalization: str = "vit",
    root: str | Path | None = None,
    seed: int = 0,
    length: int | None = None,
    classes: str | Path | None = None,
    ratios: tuple[float, float] = (0.5, 2.0),
) -> SegmentationDataset:
    """The split `split` of the data set `name`.

    image_size: pixels of the shorter side; for `shapes` also (height, width) of its scenes. crop_size: one
    number or (height, width) of the training crop. Both default to `configs/datasets.yml`; the crop of `shapes`
    to the shorter side of its scenes. root: the data set's folder or the one that holds it, default $DATASET.
    seed: of the augmentation, and of the scenes of `shapes`. length: number of scenes (`shapes`). classes: path
    of the class list (`folder`). ratios: of the random resize in training.

    Raises:
        ValueError: an unknown name, split or normalization, or an option that the data set does not have.
        FileNotFoundError: the files are not there.
    """
    defaults = dataset_defaults(name)
    if length is not None and name != "shapes":
        raise ValueError(f"length is for the data set shapes, not for {name}")
    if classes is not None and name != "folder":
        raise ValueError(f"classes is for the data set folder, not for {name}")
    image_size = _checked_size(name, image_size or defaults["im_size"])
    if name == "shapes":
        crop_size = crop_size or int(np.min(image_size))
    settings: dict[str, Any] = {
        "image_size": image_size,
        "crop_size": crop_size or defaults["crop_size"],
        "resize_factor": defaults["resize_factor"],
        "normalization": normalization,
        "seed": seed,
        "ratios": ratios,
    }
    if name == "shapes":
        from segm.data.shapes import ShapesDataset

        return ShapesDataset(split, length=length, **settings)
    return _file_dataset(name, split, root, classes, settings)


def _checked_size(name: str, image_size: int | tuple[int, int]) -> int | tuple[int, int]:
    if isinstance(image_size, int):
        return image_size
    if name != "shapes":
        raise ValueError(f"image_size of {name} is one number: the shorter side in pixels")
    height, width = image_size
    return height, width


def _file_dataset(
    name: str, split: str, root: str | Path | None, classes: str | Path | None, settings: dict[str, Any]
) -> SegmentationDataset:
    dataset_root(name, root)  # fails before the slow import of mmseg
    from segm.data.files import FileDataset
    from segm.data.folder import list_folder
    from segm.data.public import list_public

    files = list_folder(split, root, classes) if name == "folder" else list_public(name, split, root)
    return FileDataset(files, name, split, **settings)


def class_info(name: str, classes: str | Path | None = None) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and palette, uint8 RGB (C, 3), of a data set, without its files.

    classes: path of the class list, needed for `folder`.
    """
    dataset_defaults(name)
    if name == "shapes":
        from segm.data.shapes import CLASSES

        return tuple(CLASSES), np.array(list(CLASSES.values()), dtype=np.uint8)
    from segm.data.folder import OwnFiles, find_classes, read_classes
    from segm.data.public import mmseg_class

    if name != "folder":
        metainfo = mmseg_class(name)(data_prefix={"img_path": "."}, lazy_init=True).metainfo
    elif classes is None:
        raise ValueError("the classes of folder stand in a file: give its path as classes")
    else:
        path = find_classes(Path(), classes)
        metainfo = OwnFiles([], path.parent, None, read_classes(path)[0]).metainfo
    return tuple(metainfo["classes"]), np.array(metainfo["palette"], dtype=np.uint8)
