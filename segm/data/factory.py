"""From the name of a data set to its settings, its classes, and the data set."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from segm.config import DATASETS, load_config
from segm.data.dataset import SegmentationDataset
from segm.data.images import Normalization
from segm.sizes import Size


def dataset_defaults(name: str) -> dict:
    """The published settings of a data set, from `configs/datasets.yml`.

    Returns:
        `n_cls epochs eval_freq batch_size learning_rate im_size crop_size window_size window_stride resize_factor`;
        `n_cls` is None for `folder`.

    Raises:
        ValueError: no data set has this name.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; allowed: {', '.join(DATASETS)}")
    return load_config("datasets")[name]


def create_dataset(
    name: str,
    split: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    crop_size: Size | None = None,
    normalization: str | Normalization = "vit",
    root: str | Path | None = None,
    seed: int = 0,
    length: int | None = None,
    classes: str | Path | None = None,
    ratios: tuple[float, float] = (0.5, 2.0),
    flip: bool = True,
    bands: Sequence[int] | None = None,
    value_range: tuple[float, float] | None = None,
) -> SegmentationDataset:
    """One split of a data set.

    Args:
        name: of the data set.
        split: "train", "val" or "test".
        image_size: pixels of the shorter side; for `shapes` also (height, width) of its scenes. None: the data set's.
        crop_size: one number or (height, width) of the training crop, pixels. None: the data set's; that of `shapes`
            is the shorter side of its scenes.
        normalization: name, or mean and standard deviation.
        root: the data set's folder or the one that holds it; None: $DATASET.
        seed: of the augmentation, and of the scenes of `shapes`.
        length: number of scenes (`shapes`).
        classes: path of the class list (`folder`).
        ratios: of the random resize in training, lowest and highest.
        flip: whether half of the training images are mirrored.
        bands: of the images, counted from 1, that are read (`folder`); None: red, green and blue.
        value_range: lowest and highest value of images that are not stored in 8 bits; None: see
            `segm.data.images.common_range`.

    Raises:
        ValueError: an unknown name, split or normalization, or an option that the data set does not have.
        FileNotFoundError: the files are not there.
    """
    defaults = dataset_defaults(name)
    if length is not None and name != "shapes":
        raise ValueError(f"length is for the data set shapes, not for {name}")
    if classes is not None and name != "folder":
        raise ValueError(f"classes is for the data set folder, not for {name}")
    if bands is not None and name != "folder":
        raise ValueError(f"bands is for the data set folder, not for {name}")
    image_size = image_size or defaults["im_size"]
    if name == "shapes":
        crop_size = crop_size or int(np.min(image_size))
    elif not isinstance(image_size, int):
        raise ValueError(f"image_size of {name} is one number: the shorter side in pixels")
    settings: dict[str, Any] = {
        "image_size": image_size if isinstance(image_size, int) else tuple(image_size),
        "crop_size": crop_size or defaults["crop_size"],
        "resize_factor": defaults["resize_factor"],
        "normalization": normalization,
        "seed": seed,
        "ratios": ratios,
        "flip": flip,
        "bands": bands,
    }
    if name == "shapes":
        from segm.data.shapes import ShapesDataset

        return ShapesDataset(split, length=length, **settings)
    base = dataset_root(name, root)  # fails before the slow import of mmseg
    from segm.data.files import FileDataset
    from segm.data.folder import list_folder
    from segm.data.public import list_public

    files = list_folder(split, base, classes) if name == "folder" else list_public(name, split, base)
    return FileDataset(files, name, split, value_range, **settings)


def dataset_root(name: str, root: str | Path | None) -> Path:
    """`root`, or $DATASET where it is None; absolute.

    Raises:
        FileNotFoundError: neither is given.
    """
    root = root or os.environ.get("DATASET")
    if not root:
        raise FileNotFoundError(f"{name} needs files: set DATASET to its folder or to the one that holds it")
    return Path(root).expanduser().absolute()


def class_info(name: str, classes: str | Path | None = None) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names and palette, uint8 RGB (C, 3), of a data set, without its files.

    Args:
        name: of the data set.
        classes: path of the class list, needed for `folder`.

    Raises:
        ValueError: an unknown name, a wrong class list, or none.
        FileNotFoundError: the class list is not there.
    """
    dataset_defaults(name)
    if name == "shapes":
        from segm.data.shapes import CLASSES

        return tuple(CLASSES), np.array(list(CLASSES.values()), dtype=np.uint8)
    from segm.data.folder import own_classes
    from segm.data.public import mmseg_class

    if name != "folder":
        metainfo = mmseg_class(name)(data_prefix={"img_path": "."}, lazy_init=True).metainfo
    elif classes is None:
        raise ValueError("the classes of folder are in a file: give its path as classes")
    else:
        metainfo = own_classes(classes)
    return tuple(metainfo["classes"]), np.array(metainfo["palette"], dtype=np.uint8)
