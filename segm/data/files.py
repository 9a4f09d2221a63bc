"""Reading and checking image and label files. Imports mmseg."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from segm.data.dataset import IGNORE_LABEL, Sample, SegmentationDataset
from segm.data.images import DECODE_ERRORS, read_image, require_file, unreadable
from segm.data.openmmlab import BaseSegDataset, LoadAnnotations
from segm.data.public import LAYOUTS, mmseg_class


class FileDataset(SegmentationDataset):
    """Image and label files listed by one of mmsegmentation's data sets."""

    def __init__(self, files: BaseSegDataset, name: str, split: str, **settings: Any) -> None:
        super().__init__(name, split, files.metainfo["classes"], files.metainfo["palette"], **settings)
        self._files = files
        self._read_label = LoadAnnotations()
        self._complete: set[int] = set()  # images that were found to be complete when they were first read
        self.colors: Mapping[tuple[int, ...], int] = getattr(files, "colors", {})
        codes = sorted((_codes(np.array(color)), label) for color, label in self.colors.items())
        self._codes, self._labels = np.array(codes, dtype=np.int64).reshape(-1, 2).T

    def __len__(self) -> int:
        return len(self._files)

    def name_of(self, index: int) -> str:
        return self.paths(index)[0].as_posix()

    @property
    def made(self) -> str:
        """The way in which the program made the split; empty where it did not."""
        return getattr(self._files, "made", "")

    @property
    def masks_without_image(self) -> list[Path]:
        """Masks that belong to no image of the split, where its files are the user's own."""
        return getattr(self._files, "masks_without_image", [])

    def paths(self, index: int) -> tuple[Path, Path | None]:
        """Files of an image and of its label map; None where the split has none."""
        info = self._files.get_data_info(index)
        return Path(info["img_path"]), Path(info["seg_map_path"]) if "seg_map_path" in info else None

    def sources(self, index: int) -> tuple[Any, ...]:
        paths = [path for path in self.paths(index) if path is not None]
        states = [path.stat() for path in paths]
        return self._sample_name(paths[0]), *((state.st_size, state.st_mtime_ns) for state in states)

    def load(self, index: int) -> Sample:
        """The sample at `index`; its image is checked for its end when it is read for the first time.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or the label map does not fit.
        """
        path = self.paths(index)[0]
        image = read_image(path, check=index not in self._complete)
        self._complete.add(index)
        return Sample(self._sample_name(path), image, self.label(index, image.shape[:2]))

    def _sample_name(self, path: Path) -> str:
        relative = path.relative_to(self._files.data_prefix["img_path"]).as_posix()
        suffix = self._files.img_suffix or path.suffix
        return relative[: -len(suffix)]

    def label(self, index: int, shape: tuple[int, int] | None = None) -> np.ndarray | None:
        """The label map alone: uint8 (H, W), labels in [0, n_cls) or 255; None if the split has none.

        Args:
            index: of the image.
            shape: (H, W) that it must have.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it is damaged, or not what a label map is.
        """
        info = self._files.get_data_info(index)
        if "seg_map_path" not in info:
            return None
        path = Path(info["seg_map_path"])
        require_file(path, "label map")
        try:
            highest = highest_wide_label(path)
            label = self._read_label(info)["gt_seg_map"]
        except (AssertionError, *DECODE_ERRORS) as error:  # mmcv's, where cv2 gives None
            raise ValueError(unreadable(path, "label map", error)) from error
        if label.ndim != 2:
            label = self._of_colors(path, label)
        if shape is not None and label.shape != shape:
            (h, w), (image_h, image_w) = label.shape, shape
            turned = "; its EXIF orientation turns the image, not the mask" if label.shape == shape[::-1] else ""
            raise ValueError(f"{path}: the label map is {w}x{h} pixels, its image {image_w}x{image_h}{turned}")
        self._check_range(path, label, highest)
        return label

    def _of_colors(self, path: Path, picture: np.ndarray) -> np.ndarray:
        """(H, W, 3 or 4), BGR as mmcv reads it -> labels, by the colors of the class list."""
        if not len(self._codes) or picture.shape[2] not in (3, 4):
            raise ValueError(
                f"{path}: a label map has one channel, this one has {picture.shape[-1]}: save class numbers, or give "
                "every class in classes.yml the color that it has here"
            )
        codes = _codes(picture[..., 2::-1])
        places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        unknown = codes[self._codes[places] != codes]
        if unknown.size:
            color = [int(unknown[0]) >> shift & 255 for shift in (16, 8, 0)]
            raise ValueError(
                f"{path}: {unknown.size} pixels have colors of no class, such as {color}: add them to classes.yml, "
                "with the id 255 where they are to be ignored"
            )
        return self._labels[places].astype(np.uint8)

    def _check_range(self, path: Path, label: np.ndarray, highest: int) -> None:
        """Errors name the value in the file, which differs from `label` where label 0 is ignored."""
        shift = int(self._files.reduce_zero_label)
        wrong = label[(label >= self.n_cls) & (label != IGNORE_LABEL)]
        if highest <= IGNORE_LABEL and not wrong.size:
            return
        value = highest if highest > IGNORE_LABEL else int(wrong[0]) + shift
        top = max(self._files.label_map) if self._files.label_map else self.n_cls - 1 + shift
        raise ValueError(f"{path}: label {value} is not allowed; allowed are 0 to {top}, and 255 = ignored")


def highest_wide_label(path: Path) -> int:
    """Highest value of a label map with more than 8 bits, else 0: mmseg's loader would cut it to 8 bits."""
    with Image.open(path) as image:
        return int(np.asarray(image).max()) if image.mode.startswith(("I", "F")) else 0


def _codes(colors: np.ndarray) -> Any:
    """One number per color: (..., 3), RGB -> (...)."""
    return colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def read_sample(image: Path, label: Path | None, dataset: str, names: Sequence[str], palette: np.ndarray) -> Sample:
    """A photograph with its label map, read as the data set reads its own: ADE20K's 0 is ignored, the rest shifts.

    Args:
        image: file.
        label: file, or None: where the data set keeps it, if it is there.
        dataset: name of a data set.
        names: of its classes, for the user's own files.
        palette: likewise, uint8 RGB (C, 3).

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
    """The label map of a photograph, where the data set keeps it; None if no file is there."""
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
