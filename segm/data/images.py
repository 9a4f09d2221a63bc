"""Photographs as arrays: reading, resizing and normalizing them. Needs no mmseg.

What mmcv's loader and transforms give for the same file and size is the same to the bit; a test compares them.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from PIL import Image

from segm.data.stored import (
    DECODE_ERRORS,
    PNG,
    Stored,
    is_deep_png,
    is_tiff,
    read_header,
    read_stored,
    require_file,
    sound_png,
    unreadable,
)
from segm.sizes import Size, pair

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
BITS = (8, 10, 12, 14, 16, 32)  # that cameras and satellites measure with
Range = tuple[float, float]


class Normalization(NamedTuple):
    """Mean and standard deviation per RGB channel, for values in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


NORMALIZATION = {
    "vit": Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "deit": Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),  # ImageNet's
    "clip": Normalization(mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)),
    "unit": Normalization(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
}


def find_images(folder: Path, more: Sequence[str] = ()) -> list[Path]:
    """The pictures below a folder, in sorted order; `more`: suffixes that count, too."""
    return [path for path in files_below(folder) if is_image(path, more)]


def files_below(folder: Path) -> list[Path]:
    """All files below a folder and the folders that are linked there, in sorted order, but for those whose names begin
    with a dot, which are the system's own."""
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def is_image(path: Path, more: Sequence[str] = ()) -> bool:
    """Return whether a name is that of a picture, suffixes in either case."""
    return path.suffix.lower() in (*SUFFIXES, *more) and not path.name.startswith(".")


def suffixes_below(folder: Path) -> str:
    """In words, which pictures are looked for and what lies below a folder instead."""
    return f"pictures are {', '.join(SUFFIXES)}; found: {count_suffixes(files_below(folder)) or 'no file'}"


def count_suffixes(paths: Iterable[Path]) -> str:
    """In words, the most frequent suffixes of the files among these paths; "" if there is no file."""
    found = Counter(path.suffix.lower() or "no suffix" for path in paths if path.is_file())
    return ", ".join(f"{suffix} ({count})" for suffix, count in found.most_common(5))


def read_image(
    path: str | Path, check: bool = True, value_range: Range | None = None, bands: Sequence[int] | None = None
) -> np.ndarray:
    """A photograph, uint8 RGB (H, W, 3), or some bands of a picture (H, W, C), turned as its EXIF orientation says.

    Args:
        path: file.
        check: whether to look for a file that is cut off, which takes a quarter of the time of reading it.
        value_range: lowest and highest value of pictures that are not stored in 8 bits; None: see `range_of`.
        bands: the bands to read, counted from 1, as they are stored; None: red, green and blue.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, cut off or no image, has fewer bands, or nobody knows what its values mean.
    """
    path = Path(path)
    require_file(path, "image")
    data = path.read_bytes()
    if bands is not None or is_tiff(data) or is_deep_png(data):
        return as_bytes(path, read_stored(path, "image"), value_range, bands)
    try:
        data = sound_png(data)
        if check:
            check_complete(data)
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except DECODE_ERRORS as error:
        raise ValueError(unreadable(path, "image", error)) from error
    if image is None:
        raise ValueError(unreadable(path, "image", "OpenCV cannot decode it"))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def as_bytes(path: Path, stored: Stored, value_range: Range | None, bands: Sequence[int] | None = None) -> np.ndarray:
    """A picture of any type as `read_image` gives it, upright: (H, W) or (H, W, C) -> uint8 RGB (H, W, 3) or bands.

    Raises:
        ValueError: it lacks a band, has bands that are no colors, or values whose range nobody knows.
    """
    values = stored.values if stored.palette is None else stored.palette[stored.values]
    if bands is not None:
        values = chosen_bands(path, values, bands)
    elif values.ndim == 3 and values.shape[2] > 3 and not stored.is_color and stored.palette is None:
        raise ValueError(
            f"{path}: it holds {values.shape[2]} bands, none of which is called red: store three, in RGB, or choose "
            "some in training, as in --bands 4 3 2"
        )
    elif values.ndim == 3:
        values = values[..., : 3 if values.shape[2] >= 3 else 1]
    if values.dtype != np.uint8:
        low, high = value_range or range_of(path, values)
        # A value outside of the range, such as one that says "no data", is the nearest one inside.
        scaled = (np.nan_to_num(values.astype(np.float64), nan=low) - low) * (255 / (high - low))
        values = np.rint(scaled.clip(0, 255)).astype(np.uint8)
    if bands is None:
        values = np.broadcast_to(values.reshape(*values.shape[:2], -1), (*values.shape[:2], 3))
    return np.ascontiguousarray(_upright(values, stored.orientation))


def chosen_bands(path: Path, values: np.ndarray, bands: Sequence[int]) -> np.ndarray:
    """Some bands of a picture, counted from 1: (H, W) or (H, W, C) -> (H, W, len(bands)).

    Raises:
        ValueError: it has fewer.
    """
    values = values.reshape(*values.shape[:2], -1)
    if max(bands) > values.shape[2]:
        raise ValueError(f"{path}: it holds {values.shape[2]} band(s), and --bands names number {max(bands)}")
    return values[..., [band - 1 for band in bands]]


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, C), as stored -> (H, W, C) or (W, H, C), as its EXIF orientation says that it is seen."""
    if orientation >= 5:
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    return image[::-1] if orientation in (3, 4, 7, 8) else image


def range_of(path: Path, values: np.ndarray) -> Range:
    """Lowest and highest value that pictures of a type hold, judged by one of them: 0 and 1, or all of so many bits.

    Raises:
        ValueError: nothing can be said, since values are negative, or fractions above 1.
    """
    if values.dtype == bool:
        return 0, 1
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    tops = (1.0, 255.0) if values.dtype.kind == "f" else tuple(float(2**bits - 1) for bits in BITS)
    top = next((top for top in tops if high <= top), None)
    if low < 0 or top is None:
        raise ValueError(
            f"{path}: it holds {values.dtype} from {low:g} to {high:g}: give the range of the values of all images, "
            "as in --value-range 0 3000"
        )
    return 0, top


def common_range(paths: Iterable[Path], bands: Sequence[int] | None = None) -> Range | None:
    """The largest of the ranges of several pictures, see `range_of`; None: all are stored in 8 bits, or none is read.

    Raises:
        ValueError: nothing can be said of one of them.
    """
    found: list[Range] = []
    for path in paths:
        try:
            is_deep = read_header(path, "image").is_deep
        except (FileNotFoundError, ValueError):  # whoever needs it reads it, and says why it cannot
            continue
        if is_deep:
            values = read_stored(path, "image").values
            found.append(range_of(path, values if bands is None else chosen_bands(path, values, bands)))
    return max(found, key=lambda one: one[1], default=None)


def check_complete(data: bytes) -> None:
    """Refuse a picture that is cut off, which OpenCV fills up with gray in silence.

    Pillow reads an eighth of the resolution of a JPEG, any other format as a whole; see `sound_png` for PNG.

    Args:
        data: the file's bytes.

    Raises:
        OSError, SyntaxError: Pillow's, for a picture that is cut off or damaged.
    """
    if data.startswith(PNG):
        return
    with Image.open(BytesIO(data)) as opened:
        opened.draft("L", (1, 1))
        opened.load()


def resize_keep_ratio(image: np.ndarray, long: int, short: int) -> np.ndarray:
    """Largest bilinear resize of a uint8 image (H, W, C) that fits within (long, short) pixels, ratio kept."""
    height, width = image.shape[:2]
    long, short = max(long, short), min(long, short)
    scale = min(long / max(height, width), short / min(height, width))
    # A very thin image would get a side of 0 pixels.
    size = [max(int(side * scale + 0.5), 1) for side in (width, height)]
    return resize_to(image, (size[1], size[0]))


def resize_to(image: np.ndarray, size: Size) -> np.ndarray:
    """A uint8 image (H, W, C) at exactly this size, ratio not kept."""
    resized = cv2.resize(image, pair(size)[::-1], interpolation=cv2.INTER_LINEAR)
    return resized.reshape(*pair(size), -1)  # OpenCV drops the axis of a single band


def as_photo(image: np.ndarray) -> np.ndarray:
    """The first three bands of a uint8 image (H, W, C), as RGB (H, W, 3) to look at; gray where there are fewer."""
    return image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, 2)


def get_normalization(name: str | Normalization) -> Normalization:
    """The numbers of a name; numbers stay as they are. Raises a ValueError for a name that is unknown."""
    if isinstance(name, Normalization):
        return name
    if name not in NORMALIZATION:
        raise ValueError(f"unknown normalization {name!r}; allowed: {', '.join(NORMALIZATION)}")
    return NORMALIZATION[name]


def name_of_normalization(mean: Sequence[float], std: Sequence[float]) -> str | None:
    """The name of these numbers; None: they have none."""
    named = NORMALIZATION.items()
    return next((name for name, known in named if np.allclose([*known], [[*mean], [*std]], atol=1e-3)), None)


def normalize(image: np.ndarray, normalization: str | Normalization) -> torch.Tensor:
    """image: uint8 RGB (H, W, 3) -> float32 (3, H, W), contiguous; other bands (H, W, C) take the numbers in turn."""
    mean, std = (np.resize(np.array(v, np.float32), (image.shape[2], 1, 1)) for v in get_normalization(normalization))
    # numpy, not torch: torch's threads make this several times slower where other processes share the cores.
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    pixels -= 255 * mean
    pixels /= 255 * std
    return torch.from_numpy(pixels)


def resized_view(image: np.ndarray, size: Size, normalization: str | Normalization) -> torch.Tensor:
    """The input of measuring commands: uint8 RGB (H, W, 3) -> float32 (1, 3, height, width), normalized."""
    return normalize(resize_to(image, size), normalization).unsqueeze(0)
