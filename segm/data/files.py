"""Reading and checking image and label files. Imports mmseg."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from segm.data.dataset import IGNORE_LABEL, N_LOOKED_AT, Sample, SegmentationDataset, ignore_label, spread
from segm.data.images import Range, common_range, read_image
from segm.data.masks import MaskReader
from segm.data.openmmlab import BaseSegDataset
from segm.data.public import LAYOUTS, mmseg_class


class FileDataset(SegmentationDataset):
    """Image and label files listed by one of mmsegmentation's data sets."""

    def __init__(
        self, files: BaseSegDataset, name: str, split: str, value_range: Range | None = None, **settings: Any
    ) -> None:
        super().__init__(name, split, files.metainfo["classes"], files.metainfo["palette"], **settings)
        self._files = files
        self._complete: set[int] = set()  # images that were found to be complete when they were first read
        self._given_range = value_range
        self.colors: Mapping[tuple[int, ...], int] = getattr(files, "colors", {})
        self.numbers, self.ignored = _numbers(files, self.n_cls)

    def __len__(self) -> int:
        return len(self._files)

    def name_of(self, index: int) -> str:
        return self.paths(index)[0].as_posix()

    @property
    def notes(self) -> list[str]:
        """Sentences about what was not taken, or not taken as it is."""
        return getattr(self._files, "notes", [])

    @property
    def what_masks_are_there(self) -> str:
        """In words, what lies where masks are looked for; "" where the data set is not the user's own."""
        return getattr(self._files, "what_masks_are_there", "")

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
        states = [None if self.skip_bad and not path.exists() else path.stat() for path in paths]
        return self._sample_name(paths[0]), *(state and (state.st_size, state.st_mtime_ns) for state in states)

    def load(self, index: int) -> Sample:
        """The sample at `index`; its image is checked for its end when it is read for the first time.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: a file is damaged, or the label map does not fit.
        """
        path = self.paths(index)[0]
        image = read_image(path, index not in self._complete, self.value_range, self.bands)
        self._complete.add(index)
        return Sample(self._sample_name(path), image, self.label(index, image.shape[:2]))

    @cached_property
    def value_range(self) -> Range | None:
        """Lowest and highest value of images that are not stored in 8 bits: what was given, or of the largest values
        of a few; None: all are stored in 8 bits."""
        if self._given_range is not None:
            return self._given_range
        return common_range([self.paths(index)[0] for index in spread(N_LOOKED_AT, len(self))], self.bands)

    @cached_property
    def _masks(self) -> MaskReader:
        reader = MaskReader(self.n_cls, self.numbers, self.ignored, self.colors)
        paths = [self.paths(index)[1] for index in spread(N_LOOKED_AT, len(self))]
        return replace(reader, colored=reader.is_colored(path for path in paths if path is not None))

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
        path = self.paths(index)[1]
        if path is None:
            return None
        label = self._masks.read(path)
        if shape is not None and label.shape != shape:
            (h, w), (image_h, image_w) = label.shape, shape
            turned = "; its EXIF orientation turns the image, not the mask" if label.shape == shape[::-1] else ""
            raise ValueError(f"{path}: the label map is {w}x{h} pixels, its image {image_w}x{image_h}{turned}")
        return label


def _numbers(files: BaseSegDataset, n_cls: int) -> tuple[dict[int, int] | None, frozenset[int]]:
    """The numbers of classes in the masks, value -> label, and of what is ignored; None: 0, 1, 2, ..."""
    ignored = getattr(files, "ignored", frozenset({ignore_label(n_cls)}))
    if files.reduce_zero_label:
        return {label + 1: label for label in range(n_cls)}, ignored | {0}
    if files.label_map:  # 255: not among the classes
        left_out = {value for value, label in files.label_map.items() if label == IGNORE_LABEL}
        return {value: label for value, label in files.label_map.items() if value not in left_out}, ignored | left_out
    return getattr(files, "numbers", None), ignored


def read_sample(
    image: Path,
    label: Path | None,
    dataset: str,
    names: Sequence[str],
    palette: np.ndarray,
    value_range: Range | None = None,
    bands: Sequence[int] | None = None,
) -> Sample:
    """A photograph with its label map, read as the data set reads its own: ADE20K's 0 is ignored, the rest shifts.

    Args:
        image: file.
        label: file, or None: where the data set keeps it, if it is there.
        dataset: name of a data set.
        names: of its classes, for the user's own files.
        palette: likewise, uint8 RGB (C, 3); masks may show these colors.
        value_range: see `FileDataset`.
        bands: of the photograph; None: red, green and blue.

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
        files.colors = {tuple(color): number for number, color in enumerate(palette.tolist())}
    label = label or find_label(image, dataset, files)
    info = {"img_path": str(image), "label_map": files.label_map, "reduce_zero_label": files.reduce_zero_label}
    info |= {"seg_fields": []} | ({} if label is None else {"seg_map_path": str(label)})
    files.load_data_list = lambda: [info]  # instead of everything that lies beside the photograph
    files.full_init()
    settings: dict[str, Any] = {
        "bands": bands,
        "image_size": 1,
        "crop_size": 1,
        "resize_factor": 1,
        "normalization": "vit",
        "seed": 0,
    }
    return FileDataset(files, dataset, "val", value_range, **settings).load(0)


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
