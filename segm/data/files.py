"""Reading and checking image and label files. Imports mmseg."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from segm.data.dataset import SegmentationDataset
from segm.data.openmmlab import BaseSegDataset, LoadAnnotations, LoadImageFromFile
from segm.data.sample import IGNORE_LABEL, Sample

# The decoders' ways to say that a file is damaged; cv2 gives None, which mmcv turns into an AssertionError.
DECODE_ERRORS = (AssertionError, OSError, SyntaxError, ValueError, EOFError, cv2.error)
TAIL_BYTES = 65536


class FileDataset(SegmentationDataset):
    """Image and label files listed by one of mmsegmentation's data sets."""

    def __init__(self, files: BaseSegDataset, name: str, split: str, **settings) -> None:
        super().__init__(name, split, files.metainfo["classes"], files.metainfo["palette"], **settings)
        self._files = files
        self._read_label = LoadAnnotations()

    def __len__(self) -> int:
        return len(self._files)

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
        _require_file(path, "label map")
        try:
            highest = highest_wide_label(path)
            label = self._read_label(info)["gt_seg_map"]
        except DECODE_ERRORS as error:
            raise ValueError(f"{path}: damaged or no label map ({_first_line(error)})") from error
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


def read_image(path: Path) -> np.ndarray:
    """A photograph, uint8 RGB (H, W, 3).

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged or no image.
    """
    _require_file(path, "image")
    try:
        check_complete(path)
        image = LoadImageFromFile()({"img_path": str(path)})["img"]
    except DECODE_ERRORS as error:
        raise ValueError(f"{path}: damaged or no image ({_first_line(error)})") from error
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def check_complete(path: Path) -> None:
    """Raises OSError for a truncated JPEG or PNG file, which OpenCV would fill up with grey.

    The end marker is looked for in the last bytes; only a file without one (cameras append data) is decoded
    by Pillow, which is strict.
    """
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - TAIL_BYTES, 0))
        tail = file.read()
    # Compressed JPEG data never holds the end marker, but an embedded thumbnail has its own.
    if b"IEND" in tail or tail.rfind(b"\xff\xd9") > tail.rfind(b"\xff\xda"):
        return
    with Image.open(path) as image:
        image.load()


def highest_wide_label(path: Path) -> int:
    """Highest value of a label map with more than 8 bits, else 0: mmseg's loader would cut it to 8 bits."""
    with Image.open(path) as image:
        return int(np.asarray(image).max()) if image.mode.startswith(("I", "F")) else 0


def _require_file(path: Path, kind: str) -> None:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the {kind} is missing")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
