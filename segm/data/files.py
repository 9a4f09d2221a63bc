"""Reading and checking image and label files. Imports mmseg."""

from pathlib import Path

import numpy as np
from PIL import Image

from segm.data.dataset import SegmentationDataset
from segm.data.images import DECODE_ERRORS, first_line, read_image, require_file
from segm.data.openmmlab import BaseSegDataset, LoadAnnotations
from segm.data.sample import IGNORE_LABEL, Sample


class FileDataset(SegmentationDataset):
    """Image and label files listed by one of mmsegmentation's data sets."""

    def __init__(self, files: BaseSegDataset, name: str, split: str, **settings) -> None:
        super().__init__(name, split, files.metainfo["classes"], files.metainfo["palette"], **settings)
        self._files = files
        self._read_label = LoadAnnotations()

    def __len__(self) -> int:
        return len(self._files)

    def name_of(self, index: int) -> str:
        return self._files.get_data_info(index)["img_path"]

    def load(self, index: int) -> Sample:
        info = self._files.get_data_info(index)
        path = Path(info["img_path"])
        image = read_image(path)
        label = self._load_label(info, image.shape[:2]) if "seg_map_path" in info else None
        return Sample(self._sample_name(path), image, label)

    def _sample_name(self, path: Path) -> str:
        relative = path.relative_to(self._files.data_prefix["img_path"]).as_posix()
        suffix = self._files.img_suffix or path.suffix
        return relative[: -len(suffix)]

    def _load_label(self, info: dict, shape: tuple[int, int]) -> np.ndarray:
        """uint8 (H, W), labels in [0, n_cls) or 255"""
        path = Path(info["seg_map_path"])
        require_file(path, "label map")
        try:
            highest = highest_wide_label(path)
            label = self._read_label(info)["gt_seg_map"]
        except (AssertionError, *DECODE_ERRORS) as error:  # mmcv's, where cv2 gives None
            raise ValueError(f"{path}: damaged or no label map ({first_line(error)})") from error
        if label.ndim != 2:
            raise ValueError(f"{path}: a label map has one channel, this one has {label.shape[-1]}")
        if label.shape != shape:
            (h, w), (image_h, image_w) = label.shape, shape
            raise ValueError(f"{path}: the label map is {w}x{h} pixels, its image {image_w}x{image_h}")
        self._check_range(path, label, highest)
        return label

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
