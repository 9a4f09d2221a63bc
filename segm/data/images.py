"""Photographs as arrays: reading and resizing them. Needs OpenCV and Pillow alone, not mmseg.

What mmcv's loader and transforms give for the same file and size is the same to the bit; a test compares them.
"""

from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from segm.data.normalization import normalize

SUFFIXES = (".jpg", ".jpeg", ".png")
# The decoders' ways to say that a file is damaged; cv2 also gives None.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, cv2.error)
TAIL_BYTES = 65536


def find_images(folder: Path) -> list[Path]:
    """The photographs below a folder, in sorted order."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())


def read_image(path: str | Path) -> np.ndarray:
    """A photograph, uint8 RGB (H, W, 3).

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged or no image.
    """
    path = Path(path)
    require_file(path, "image")
    try:
        check_complete(path)
        image = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_COLOR)
    except DECODE_ERRORS as error:
        raise ValueError(f"{path}: damaged or no image ({first_line(error)})") from error
    if image is None:
        raise ValueError(f"{path}: damaged or no image (OpenCV cannot decode it)")
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


def resize_keep_ratio(image: np.ndarray, long: int, short: int) -> np.ndarray:
    """Largest bilinear resize of a uint8 image (H, W, 3) that fits within (long, short) pixels, ratio kept."""
    height, width = image.shape[:2]
    long, short = max(long, short), min(long, short)
    scale = min(long / max(height, width), short / min(height, width))
    # A very thin image would get a side of 0 pixels.
    size = [max(int(side * scale + 0.5), 1) for side in (width, height)]
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)


def resize_square(image: np.ndarray, side: int) -> np.ndarray:
    """A uint8 image (H, W, 3) at side × side pixels, ratio not kept."""
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR)


def square_view(image: np.ndarray, side: int, normalization: str) -> torch.Tensor:
    """What measuring commands feed: uint8 RGB (H, W, 3) -> float32 (1, 3, side, side), normalized."""
    return normalize(resize_square(image, side), normalization).unsqueeze(0)


def require_file(path: Path, kind: str) -> None:
    """Raises a FileNotFoundError unless there is such a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the {kind} is missing")


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
