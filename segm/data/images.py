"""Photographs as arrays: reading and resizing them. Needs OpenCV and Pillow alone, not mmseg.

What mmcv's loader and transforms give for the same file and size is the same to the bit; a test compares them.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image

from segm.data.normalization import normalize
from segm.sizes import Size, pair

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
# The decoders' ways to say that a file is damaged; cv2 also gives None.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, cv2.error, Image.DecompressionBombError)
PNG_START = b"\x89PNG\r\n\x1a\n"
JPEG_END = b"\xff\xd9"
MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]", re.DOTALL)  # all others have a length, but for the end
# Compressed data that no picture misses: a decoder reads it only where the file's own data has ended too early. With
# all restart markers, so that one of them is the one that it waits for.
FILLER = b"".join(bytes([0xFF, 0xD0 + n]) + bytes((37 * i * i + 11 * i + n) % 255 for i in range(64)) for n in range(8))
FILLER = bytes((37 * i * i + 11 * i) % 255 for i in range(512)) + FILLER


def find_images(folder: Path) -> list[Path]:
    """The photographs below a folder, in sorted order; names that begin with a dot are the system's own."""
    return sorted(path for path in folder.rglob("*") if is_image(path) and path.is_file())


def is_image(path: Path) -> bool:
    """Whether a name is that of a picture, suffixes in either case."""
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
        check: whether to look for a file that is cut off, which takes as long as reading it.

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
    """Raise an OSError for a picture that is cut off, which OpenCV fills up with grey without a word.

    A JPEG may have an end marker all the same, where a program has put one. So it is decoded once more, with other
    data in front of the end: a complete picture stays as it is.

    Args:
        data: the file's bytes.
    """
    if data.startswith(PNG_START):
        _check_png(data)
        return
    if not data.startswith(b"\xff\xd8"):
        with Image.open(BytesIO(data)) as opened:
            opened.load()
        return
    end = _jpeg_end(data)
    if end is None:
        raise OSError("image file is truncated: it has no end")
    if _coarse(data) != _coarse(data[:end] + FILLER + data[end:]):
        raise OSError("image file is truncated")


def _jpeg_end(data: bytes) -> int | None:
    """Where the end marker of a JPEG is: not that of its thumbnail, nor of what a camera appends."""
    at = 2
    while (marker := MARKER.search(data, at)) is not None:
        if marker[0] == JPEG_END:
            return marker.start()
        at = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2], "big")
    return None


def _coarse(data: bytes) -> bytes:
    """An eighth of a JPEG, which needs all of its data, but little time; a progressive one, or one with restart
    markers, as a whole."""
    with Image.open(BytesIO(data)) as opened:
        if "progression" not in opened.info and b"\xff\xdd" not in data:
            opened.draft("L", (max(opened.width // 8, 1), max(opened.height // 8, 1)))
        return opened.tobytes()


def _check_png(data: bytes) -> None:
    """Raise an OSError unless all chunks of a PNG are there, with their checksums."""
    at, kind = len(PNG_START), b""
    while kind != b"IEND":
        if len(data) < at + 12:
            raise OSError("image file is truncated")
        length = int.from_bytes(data[at : at + 4], "big")
        kind, end = data[at + 4 : at + 8], at + 8 + length
        if zlib.crc32(data[at + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise OSError("image file is truncated or damaged: a checksum is wrong")
        at = end + 4


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


def resized_view(image: np.ndarray, size: Size, normalization: str) -> torch.Tensor:
    """What measuring commands feed: uint8 RGB (H, W, 3) -> float32 (1, 3, height, width), normalized."""
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
    return f"{path}: damaged or no {kind} ({first_line(error)})"


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
