"""Pictures as they are stored: their values, before anything is made of them. Pillow and tifffile read them."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from segm.errors import one_line, what_it_is

PNG = b"\x89PNG\r\n\x1a\n"
TIFFS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
ORIENTATION = 0x0112  # of EXIF and TIFF: 1 upright, 5 to 8 turned by a right angle
PLAIN = (0, 1, 2)  # photometric interpretations of TIFF: inverted grey, grey, RGB
INVERTED, PALETTE = 0, 3
TIFF_LOSSY = {6, 7, 33007, 34892, 50001}  # compressions: JPEG in its variants, WebP
# The decoders' ways to say that a file is damaged; cv2 also gives None.
DECODE_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, RuntimeError, KeyError, IndexError),
    *(TypeError, cv2.error, Image.DecompressionBombError),
)


class RefusedError(ValueError):
    """A sound picture that cannot be taken, in a sentence about it."""


class Stored(NamedTuple):
    """A picture as it is stored.

    Attributes:
        values: (H, W), or (H, W, C) of several bands; of the type in the file.
        palette: uint8 RGB (K, 3), the colors that the values stand for; None: they stand for themselves.
        orientation: of EXIF, which `values` do not follow: 1 to 8.
        lossy: name of a compression that changes values; "" where they are those that were saved.
        is_color: whether the first three bands are red, green and blue.
    """

    values: np.ndarray
    palette: np.ndarray | None = None
    orientation: int = 1
    lossy: str = ""
    is_color: bool = False


class Header(NamedTuple):
    """The first part of a file, which tells the form of the picture.

    Attributes:
        width, height: as stored, pixels.
        orientation: of EXIF, 1 to 8.
        n_bands: values per pixel.
        is_deep: whether a value takes more than 8 bits, or may be negative.
    """

    width: int
    height: int
    orientation: int
    n_bands: int
    is_deep: bool


def read_stored(path: Path, kind: str) -> Stored:
    """Read a picture.

    Args:
        path: file.
        kind: "image" or "label map", for messages.

    Raises:
        FileNotFoundError: it is missing.
        ValueError: it is damaged, cut off, no picture, or several.
    """
    require_file(path, kind)
    try:
        data = path.read_bytes()
        return _read_tiff(data) if is_tiff(data) else _read_other(data)
    except RefusedError as error:
        raise ValueError(f"{path}: {error}") from error
    except DECODE_ERRORS as error:
        raise ValueError(unreadable(path, kind, error)) from error


def read_header(path: Path, kind: str) -> Header:
    """Read the size of a picture and no more; raises as `read_stored`."""
    require_file(path, kind)
    try:
        with path.open("rb") as file:
            start = file.read(4)
        if is_tiff(start):
            from tifffile import TiffFile

            with TiffFile(path) as tiff:
                page = tiff.pages.first
                is_deep = page.dtype not in (bool, np.uint8) and page.photometric != PALETTE
                return Header(page.imagewidth, page.imagelength, _orientation(page.tags), page.samplesperpixel, is_deep)
        data = path.read_bytes() if start == PNG[:4] else b""
        with Image.open(io.BytesIO(sound_png(data)) if data else path) as image:
            orientation = int(image.getexif().get(ORIENTATION, 1))
            n_bands = 1 if image.mode in ("P", "PA") else len(image.getbands())
            is_deep = is_deep_png(data) or image.mode[0] in "IF"
            return Header(*image.size, orientation, n_bands, is_deep)
    except DECODE_ERRORS as error:
        raise ValueError(unreadable(path, kind, error)) from error


def is_deep_png(data: bytes) -> bool:
    """Return whether this is a PNG of 16 bits per value, of which OpenCV's colors and Pillow keep the upper 8."""
    return data.startswith(PNG) and data[24:25] == b"\x10"


def is_tiff(data: bytes) -> bool:
    """Return whether a file that begins like this is a TIFF."""
    return data[:4] in TIFFS


def _read_tiff(data: bytes) -> Stored:
    from tifffile import TiffFile  # brings its codecs along: a quarter of a second

    with TiffFile(io.BytesIO(data)) as tiff:
        pages = [page for page in tiff.pages if not page.is_reduced and not page.is_mask]  # no previews, no masks
        if len(pages) > 1:
            raise RefusedError(f"it holds {len(pages)} pictures: store each in a file of its own")
        page = pages[0] if pages else tiff.pages.first
        if any(at + size > len(data) for at, size in zip(page.dataoffsets, page.databytecounts, strict=True)):
            raise ValueError("it is cut off")  # of a JPEG inside, its decoder would fill the rest up
        orientation, lossy = _orientation(page.tags), "JPEG" if page.compression in TIFF_LOSSY else ""
        if page.photometric == PALETTE:
            return Stored(page.asarray(), (page.colormap.T >> 8).astype(np.uint8), orientation, lossy)
        if page.photometric not in PLAIN and not lossy:  # CMYK, YCbCr, Lab
            with Image.open(io.BytesIO(data)) as image:
                return Stored(np.asarray(image.convert("RGB")), None, orientation, lossy, True)
        values = page.asarray()
        if page.planarconfig == 2 and values.ndim == 3:
            values = np.moveaxis(values, 0, -1)
        if values.ndim not in (2, 3):
            raise RefusedError(f"it holds an array {values.shape}, not a picture")
        if page.photometric == INVERTED:
            values = ~values if values.dtype == bool else (1 << page.bitspersample) - 1 - values
        return Stored(values, None, orientation, lossy, values.ndim == 3 and page.photometric not in PLAIN[:2])


def _orientation(tags: Any) -> int:
    return int(tags.valueof(ORIENTATION, 1))


def _read_other(data: bytes) -> Stored:
    lossy = "WebP" if data[8:15] == b"WEBPVP8" and b"VP8L" not in data[:64] else ""
    data = sound_png(data)
    with Image.open(io.BytesIO(data)) as image:
        orientation = int(image.getexif().get(ORIENTATION, 1))
        lossy = "JPEG" if image.format in ("JPEG", "MPO") else lossy
        if image.mode in ("P", "PA"):
            palette = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            return Stored(np.asarray(image.getchannel(0)), palette, orientation, lossy)
        if image.mode in ("RGB", "RGBA") and is_deep_png(data):
            values = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
            return Stored(np.concatenate((values[..., 2::-1], values[..., 3:]), -1), None, orientation, lossy, True)
        if image.mode in ("LA", "La"):
            return Stored(np.asarray(image)[..., 0], None, orientation, lossy)
        if image.mode not in ("1", "L", "I", "F", "RGB", "RGBA") and not image.mode.startswith("I;"):
            return Stored(np.asarray(image.convert("RGB")), None, orientation, lossy, True)
        values = np.asarray(image)
        return Stored(values, None, orientation, lossy, values.ndim == 3)


def sound_png(data: bytes) -> bytes:
    """A PNG without the comments whose checksum is wrong, which no pixel depends on; any other file as it is.

    Args:
        data: the file's bytes.

    Raises:
        ValueError: it is cut off, or the checksum of a part that pixels depend on is wrong.
    """
    if not data.startswith(PNG):
        return data
    parts, at, name = [PNG], len(PNG), b""
    while name != b"IEND":
        if at + 12 > len(data):
            raise ValueError("the PNG is cut off")
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data):
            raise ValueError("the PNG is cut off")
        if zlib.crc32(data[at + 4 : end - 4]) == struct.unpack_from(">I", data, end - 4)[0]:
            parts.append(data[at:end])
        elif not name[0] & 0x20:  # a capital: no decoder may leave it out
            raise ValueError(f"the checksum of {name.decode('latin-1')} in the PNG is wrong")
        at = end
    return data if sum(map(len, parts)) == at else b"".join(parts)


def require_file(path: Path, kind: str) -> None:
    """Raises a FileNotFoundError unless there is such a file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: the {kind} is missing")


def unreadable(path: Path, kind: str, error: Exception | str) -> str:
    """In a line, why a decoder does not take a picture."""
    if isinstance(error, UnidentifiedImageError):
        return f"{path}: damaged or no {kind} ({what_it_is(path)})"
    if isinstance(error, Image.DecompressionBombError):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return f"{path}: the {kind} has more pixels than are read, {limit:,} at most: cut it into smaller ones"
    return f"{path}: damaged or no {kind} ({one_line(error)})"
