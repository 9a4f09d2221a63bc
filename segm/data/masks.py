"""Label maps: what a picture, as it is stored, says about the class of every pixel."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from segm.data.dataset import IGNORE_LABEL, ignore_label, label_type
from segm.data.stored import Stored, read_header, read_stored

Color = tuple[int, ...]
MOST = 10  # values that a message lists


@dataclass(frozen=True)
class MaskReader:
    """Reads label maps.

    Attributes:
        n_cls: number of classes.
        numbers: value in the file -> label; None: they are the same.
        ignored: values that are ignored.
        colors: (r, g, b) -> label, of masks that show the colors of the classes; empty: no mask does.
        colored: whether pictures of gray values show colors, too, as where other masks of the data set are colored.
    """

    n_cls: int
    numbers: Mapping[int, int] | None = None
    ignored: frozenset[int] = frozenset({IGNORE_LABEL})
    colors: Mapping[Color, int] = field(default_factory=dict)
    colored: bool = False

    def read(self, path: Path) -> np.ndarray:
        """(H, W), uint8, or uint16 for more than 255 classes: labels in [0, n_cls), or that of ignored pixels.

        Raises:
            FileNotFoundError: it is missing.
            ValueError: it is damaged, or holds what no class is.
        """
        stored = read_stored(path, "label map")
        if stored.lossy:
            raise ValueError(
                f"{path}: the label map is stored as {stored.lossy}, which changes values: save it without loss, as PNG"
            )
        values = stored.values
        if values.ndim == 3:
            if values.shape[2] not in (3, 4) or not self.colors:
                raise ValueError(
                    f"{path}: a label map has one channel, this one has {values.shape[2]}: save class numbers, or give "
                    "every class in classes.yml the color that it has here"
                )
            return self._of_colors(path, values[..., :3])
        values = self._whole(path, values)
        found, places = _distinct(values)
        shown = self._shown(stored, found)
        labels = self._of_numbers(path, found) if shown is None else self._of_colors(path, shown)
        return _placed(labels, found, places)

    def is_colored(self, paths: Iterable[Path]) -> bool:
        """Return whether some of these label maps are stored as colors, so that all of them mean colors."""
        return bool(self.colors) and any(_stored_color(path) for path in paths)

    def _whole(self, path: Path, values: np.ndarray) -> np.ndarray:
        """Whole numbers of any type as int64, or uint8 as it is."""
        if values.dtype.kind == "f":
            wrong = values[~(np.isfinite(values) & (values == np.rint(values)) & (np.abs(values) < 2.0**62))]
            if wrong.size:
                raise ValueError(
                    f"{path}: {wrong.size} pixels hold no whole number, such as {wrong[0]:g}: save class numbers"
                )
        return values if values.dtype == np.uint8 else values.astype(np.int64)

    @cached_property
    def _values(self) -> dict[int, int]:
        """Value -> label, of all classes."""
        return dict(self.numbers) if self.numbers is not None else {label: label for label in range(self.n_cls)}

    @cached_property
    def _grays(self) -> bool:
        """True if all classes have gray colors, so that a picture of gray values can show them."""
        return bool(self.colors) and all(len({*color}) == 1 for color in self.colors)

    def _shown(self, stored: Stored, found: np.ndarray) -> np.ndarray | None:
        """uint8 RGB (K, 3), the colors of K values, where the picture is meant by its colors; None: by its numbers."""
        if not self.colors:
            return None
        if stored.palette is not None:
            shown = stored.palette[np.minimum(found, len(stored.palette) - 1)]
            return shown if self.colored or all(tuple(color) in self.colors for color in shown.tolist()) else None
        gray = self.colored or (self._grays and all((int(value),) * 3 in self.colors for value in found))
        if not gray or found.min() < 0 or found.max() > 255:
            return None
        return np.repeat(found.astype(np.uint8)[:, None], 3, 1)

    @cached_property
    def _codes(self) -> tuple[np.ndarray, np.ndarray]:
        """The colors of the classes, each as one number, in order, and their labels."""
        order = sorted((code(np.array(color)), label) for color, label in self.colors.items())
        codes, labels = np.array(order, dtype=np.int64).T
        return codes, labels.astype(label_type(self.n_cls))

    def _of_colors(self, path: Path, picture: np.ndarray) -> np.ndarray:
        """uint8 RGB (..., 3) -> labels (...)."""
        known, labels = self._codes
        codes = code(picture >> 8 if picture.dtype == np.uint16 else picture)
        places = np.searchsorted(known, codes).clip(max=len(known) - 1)
        unknown = codes[known[places] != codes]
        if unknown.size:
            color = [int(unknown[0]) >> shift & 255 for shift in (16, 8, 0)]
            raise ValueError(
                f"{path}: {unknown.size} pixels have colors of no class, such as {color}: add them to classes.yml, "
                "with the id 255 where they are to be ignored"
            )
        return labels[places]

    def _of_numbers(self, path: Path, found: np.ndarray) -> np.ndarray:
        """The labels of K values, (K,) -> (K,)."""
        labels = np.zeros(len(found), label_type(self.n_cls))
        for place, value in enumerate(map(int, found)):
            label = self._values.get(value, ignore_label(self.n_cls) if value in self.ignored else None)
            if label is None:
                raise ValueError(
                    f"{path}: label {value} is not allowed; allowed are {self._allowed()} (of your own data, ignore in "
                    "classes.yml names more)"
                )
            labels[place] = label
        return labels

    def _allowed(self) -> str:
        ignored = sorted(self.ignored)
        lowest = 0 if 0 in ignored else min(self._values)
        return f"{lowest} to {max(self._values)}, and {', '.join(map(str, ignored[:MOST]))} = ignored"


def _stored_color(path: Path) -> bool:
    """Return whether a picture has several bands; False for one that cannot be read: reading it says why."""
    try:
        return read_header(path, "label map").n_bands > 2
    except (FileNotFoundError, ValueError):
        return False


def code(colors: np.ndarray) -> np.ndarray:
    """One number per color: (..., 3), RGB -> (...)."""
    return colors.astype(np.int64) @ np.array([1 << 16, 1 << 8, 1])


def _distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values in order, (K,), and, for each pixel, its value in 8 bits or the place of its value, (H, W)."""
    if values.dtype == np.uint8:  # counting is ten times as fast as sorting
        return np.flatnonzero(np.bincount(values.ravel(), minlength=256)), values
    found, places = np.unique(values, return_inverse=True)
    return found, places.reshape(values.shape)


def _placed(labels: np.ndarray, found: np.ndarray, places: np.ndarray) -> np.ndarray:
    """The labels of K values, (K,), at the pixels that have them: (H, W)."""
    if places.dtype != np.uint8:
        return labels[places]
    table = np.zeros(256, labels.dtype)
    table[found] = labels
    return table[places]
