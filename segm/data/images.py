"""Photographs as arrays: reading, resizing and normalizing them. Needs OpenCV and Pillow alone, not mmseg.

What mmcv's loader and transforms give for the same file and size is the same to the bit; a test compares them.
"""

from collections import Counter
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

from segm.errors import one_line
from segm.sizes import Size, pair

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
# The decoders' ways to say that a file is damaged; cv2 also gives None.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, cv2.error, Image.DecompressionBombError)


class Normalization(NamedTuple):
    """Mean and standard deviation per RGB channel, for values in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


NORMALIZATION = {
    "vit": Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "deit": Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}


def find_images(folder: Path) -> list[Path]:
    """The photographs below a folder, in sorted order; names that begin with a dot are the system's own."""
    return sorted(path for path in folder.rglob("*") if is_image(path) and path.is_file())


def is_image(path: Path) -> bool:
    """Return whether a name is that of a picture, suffixes in either case."""
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".")


def suffixes_below(folder: Path) -> str:
    """In words, which pictures are looked for and what lies below a folder instead."""
    return f"pictures are {', '.join(SUFFIXES)}; found: {count_suffixes(folder.rglob('*')) or 'no file'}"


def count_suffixes(paths: Iterable[Path]) -> str:
    """In words, the most frequent suffixes of the files among these paths; "" if there is no file."""
    found = Counter(path.suffix.lower() or "no suffix" for path in paths if path.is_file())
    return ", ".join(f"{suffix} ({count})" for suffix, count in found.most_common(5))


def read_image(path: str | Path, check: bool = True) -> np.ndarray:
    """A photograph, uint8 RGB (H, W, 3), turned as its EXIF orientation says.

    Args:
        path: file.
        check: whether to look for a file that is cut off, which takes a quarter of the time of reading it.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, cut off or no image.
    """
    path = Path(path)
    require_file(path, "image")
    try:
        data = np.fromfile(path, np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR)
        if image is not None and check:
            check_complete(data.tobytes())
    except DECODE_ERRORS as error:
        raise ValueError(unreadable(path, "image", error)) from error
    if image is None:
        raise ValueError(f"{path}: damaged or no image (OpenCV cannot decode it)")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def check_complete(data: bytes) -> None:
    """Refuse a picture that is cut off, which OpenCV fills up with gray in silence.

    Pillow reads all of it: the checksums of a PNG, an eighth of the resolution of a JPEG, any other format as a whole.

    Args:
        data: the file's bytes.

    Raises:
        OSError, SyntaxError: Pillow's, for a picture that is cut off or damaged.
    """
    with Image.open(BytesIO(data)) as opened:
        if opened.format == "PNG":
            opened.verify()
            return
        opened.draft("L", (1, 1))
        opened.load()


def resize_keep_ratio(image: np.ndarray, long: int, short: int) -> np.ndarray:
    """Largest bilinear resize of a uint8 image (H, W, 3) that fits within (long, short) pixels, ratio kept."""
    height, width = image.shape[:2]
    long, short = max(long, short), min(long, short)
    scale = min(long / max(height, width), short / min(height, width))
    # A very thin image would get a side of 0 pixels.
    size = [max(int(side * scale + 0.5), 1) for side in (width, height)]
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def resize_to(image: np.ndarray, size: Size) -> np.ndarray:
    """A uint8 image (H, W, 3) at exactly this size, ratio not kept."""
    return cv2.resize(image, pair(size)[::-1], interpolation=cv2.INTER_LINEAR)


def get_normalization(name: str) -> Normalization:
    """Raises ValueError, with the allowed names, for an unknown one."""
    if name not in NORMALIZATION:
        raise ValueError(f"unknown normalization {name!r}; allowed: {', '.join(NORMALIZATION)}")
    return NORMALIZATION[name]


def normalize(image: np.ndarray, normalization: str) -> torch.Tensor:
    """image: uint8 RGB (H, W, 3) -> float32 (3, H, W), contiguous."""
    mean, std = get_normalization(normalization)
    # numpy, not torch: torch's threads make this several times slower where other processes share the cores.
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    pixels -= 255 * np.array(mean, np.float32)[:, None, None]
    pixels /= 255 * np.array(std, np.float32)[:, None, None]
    return torch.from_numpy(pixels)


def resized_view(image: np.ndarray, size: Size, normalization: str) -> torch.Tensor:
    """The input of measuring commands: uint8 RGB (H, W, 3) -> float32 (1, 3, height, width), normalized."""
    return normalize(resize_to(image, size), normalization).unsqueeze(0)


def require_file(path: Path, kind: str) -> None:
    """Raises a FileNotFoundError unless there is such a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the {kind} is missing")


def unreadable(path: Path, kind: str, error: Exception) -> str:
    """In a line, why a decoder does not take a picture."""
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"{path}: the {kind} has more pixels than are read, {limit:,} at most: cut it into smaller ones"
    return f"{path}: damaged or no {kind} ({one_line(error)})"
