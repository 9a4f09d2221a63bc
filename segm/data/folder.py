"""The data set `folder`: the user's own images and masks. Imports mmseg.

Structure below the root, with the splits in one of three forms:

    images/<split>/*           annotations/<split>/*       split folders: train, val, test, or training, validation,
                                                           testing, as they are often called
    images/*                   annotations/*               and <split>.txt: a name per line, with or without suffix
    images/*                   annotations/*               alone: a tenth of the images, chosen by the hash of
                                                           the name, is `val`, the rest `train`

The class list (`classes.yml`) is a list of names or of `{id, name, color: [r, g, b]}`. Where every class has a color,
masks may be RGB pictures in these colors; an entry with the id 255 is a color that is ignored. With the two keys
`classes` and `ignore` the list also says which values of the masks are ignored besides 255: a number or a list of them.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from segm.data.dataset import WIDE_IGNORE_LABEL, ignore_label
from segm.data.images import SUFFIXES, count_suffixes, files_below, find_images, is_image, suffixes_below
from segm.data.masks import Color
from segm.data.openmmlab import BaseSegDataset
from segm.data.public import open_list
from segm.errors import brief
from segm.storage import read_yaml

MOST_CLASSES = WIDE_IGNORE_LABEL
MASK_SUFFIXES = (".gif",)  # of masks alone: their colors are a palette
# Names of the folders of a split, in either case.
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
LOOKS_LIKE_A_SPLIT = re.compile(r"(train|val|test|dev|eval|hold)", re.IGNORECASE)


# Chosen one after the other, each as far from those before as sRGB allows, in CIELAB: any two of the first 12 differ by
# ΔE*ab 47, of all 40 by 32; and all from white, and from black, which is what is ignored.
DISTINCT = (
    "1e698700ff00ff00000000ffff00b4ffe10000873c965a003c1e9600fff0ff8796b496ff00ff96ff005a1e3c0fffc3695a2d1e00d2ff788700"
    "ff00ffff8700b4f0001eb400870000b4b4e10096872d4b96a50f4be1f078875a7878006996e1a51ea5ff0069ffff694bc34bd278875a962df0"
    "d2a596e169b4"
)


class ClassList(NamedTuple):
    """The content of a class list.

    Attributes:
        metainfo: `{"classes": names, "palette": colors}`; the palette is left out where the list has no colors.
        colors: (r, g, b) -> label, of masks that show these colors.
        numbers: value in masks -> label; None: they are the same.
        ignored: values in masks that are ignored.
    """

    metainfo: dict[str, Any]
    colors: Mapping[Color, int]
    numbers: Mapping[int, int] | None
    ignored: frozenset[int]


class OwnFiles(BaseSegDataset):
    """mmsegmentation's data set for images and masks with mixed suffixes, listed beforehand.

    Attributes:
        colors, numbers, ignored: see `ClassList`.
        notes: sentences about what was not taken, or not taken as it is.
    """

    def __init__(
        self, images: list[Path], image_dir: Path, label_dir: Path | None, classes: ClassList, notes: Sequence[str] = ()
    ) -> None:
        self._images, self._label_dir = images, label_dir
        self._masks = _by_stem(find_images(label_dir, MASK_SUFFIXES), label_dir) if label_dir is not None else {}
        _, self.colors, self.numbers, self.ignored = classes
        self.notes = list(notes)
        self._ending = _common_ending([self._stem(path, image_dir) for path in images], self._masks)
        prefix = {"img_path": str(image_dir)}
        super().__init__(
            img_suffix="",
            data_prefix=prefix,
            metainfo=_distinct(len(classes.metainfo["classes"])) | classes.metainfo,
            lazy_init=True,
        )

    @staticmethod
    def _stem(path: Path, folder: Path) -> str:
        return path.relative_to(folder).with_suffix("").as_posix()

    def load_data_list(self) -> list[dict[str, Any]]:
        """mmsegmentation's entry of every image."""
        return [self._data_info(path) for path in self._images]

    def _data_info(self, path: Path) -> dict[str, Any]:
        info: dict[str, Any] = {"img_path": str(path), "label_map": None, "reduce_zero_label": False, "seg_fields": []}
        if self._label_dir is not None:
            stem = self._stem(path, Path(self.data_prefix["img_path"]))
            info["seg_map_path"] = str(self._masks.get(stem + self._ending, self._label_dir / f"{stem}.png"))
        return info

    @property
    def masks_without_image(self) -> list[Path]:
        """Masks that belong to no image of the folder, whatever its split."""
        folder = Path(self.data_prefix["img_path"])
        images = {self._stem(path, folder) + self._ending for path in find_images(folder)}
        return [path for stem, path in self._masks.items() if stem not in images]

    @property
    def what_masks_are_there(self) -> str:
        """In words, what lies where masks are looked for."""
        if self._label_dir is None or not self._label_dir.is_dir():
            return f"{self._label_dir} is no folder"
        names = [path.relative_to(self._label_dir).as_posix() for path in files_below(self._label_dir)]
        return f"{self._label_dir} holds {', '.join(names[:3]) or 'no file'}" + " …" * (len(names) > 3)


def _common_ending(images: list[str], masks: Mapping[str, Path]) -> str:
    """The ending, such as "_mask", of all masks after the names of their images; "" where none fits all."""
    if not images or images[0] in masks:
        return ""
    first = images[0]
    endings = [stem[len(first) :] for stem in masks if stem.startswith(first)]
    fitting = [ending for ending in endings if all(stem + ending in masks for stem in images)]
    return fitting[0] if len(fitting) == 1 else ""


def list_folder(split: str, root: Path, classes: str | Path | None) -> BaseSegDataset:
    """The files of one split.

    Args:
        split: "train", "val" or "test".
        root: the folder that holds `images`, or that one's parent.
        classes: the class list; None: `classes.yml` in the folder.

    Raises:
        ValueError: unknown split, or a wrong class list.
        FileNotFoundError: a folder, the class list or every image is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"folder has no split {split!r}; allowed: {', '.join(SPLITS)}")
    base = next((folder for folder in (root, root / "folder") if (folder / "images").is_dir()), None)
    if base is None:
        tried = f"{root / 'images'} and {root / 'folder/images'}"
        raise FileNotFoundError(f"folder not found: tried {tried}; set DATASET to the folder that holds images")
    listed = read_classes(find_classes(base, classes))
    image_dir, images, notes = _split_images(base, split)
    label_dir = base / "annotations" / image_dir.relative_to(base / "images")
    if not label_dir.is_dir() and image_dir != base / "images":  # the masks' folder may be called otherwise
        label_dir = _split_folder(base / "annotations", split) or label_dir
    if not images:
        raise FileNotFoundError(f"folder {split}: no image in {image_dir}; {suffixes_below(image_dir)}")
    # Only a test set may come without masks; elsewhere a missing folder is a mistake that loading reports.
    labelled = split != "test" or label_dir.is_dir()
    files = OwnFiles(images, image_dir, label_dir if labelled else None, listed, notes)
    return open_list(files, f"folder {split}", image_dir)


def _distinct(n_classes: int) -> dict[str, Any]:
    """The palette of classes without colors; empty where there are too many, for whom mmsegmentation chooses some."""
    values = iter(bytes.fromhex(DISTINCT))
    colors = [[*color] for color in zip(values, values, values, strict=True)]
    return {"palette": colors[:n_classes]} if n_classes <= len(colors) else {}


def own_classes(file: str | Path) -> dict[str, Any]:
    """`{"classes": names, "palette": colors}` of a class list; missing colors are chosen.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: see `read_classes`.
    """
    path = find_classes(Path(), file)
    return OwnFiles([], path.parent, None, read_classes(path)).metainfo


def find_classes(base: Path, classes: str | Path | None) -> Path:
    """The file with the class list: `classes`, or `classes.yml` or `classes.yaml` below the root."""
    candidates = [Path(classes)] if classes else [base / "classes.yml", base / "classes.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no class list: {' or '.join(map(str, candidates))} does not exist")


def read_classes(path: Path) -> ClassList:
    """A class list. Names are texts, whatever YAML means by them: `no` is a class like any other.

    Raises:
        ValueError: the file is no list of names or of `{id, name, color}` with ids 0, 1, 2, ... and 255.
    """
    entries = read_yaml(path, yaml.BaseLoader)
    ignored: frozenset[int] = frozenset()
    if isinstance(entries, dict):
        if set(entries) != {"classes", "ignore"}:
            raise ValueError(f"{path}: give a YAML list of classes, or the two keys classes and ignore")
        ignored, entries = _ignored(path, entries["ignore"]), entries["classes"]
    if not isinstance(entries, list) or not 0 < len(entries) <= MOST_CLASSES + 1:
        raise ValueError(f"{path}: the class list is a YAML list of 1 to {MOST_CLASSES} classes")
    if all(isinstance(entry, dict) for entry in entries):
        return _read_entries(path, entries, ignored)
    names = _names(path, entries)
    return ClassList({"classes": names}, {}, *_numbering(len(names), ignored))


def _ignored(path: Path, given: Any) -> frozenset[int]:
    """The values that `ignore` names: one whole number or a list of them."""
    values = given if isinstance(given, list) else [given]
    if not all(isinstance(value, str) and re.fullmatch(r"-?\d{1,10}", value.strip()) for value in values):
        raise ValueError(f"{path}: ignore is a whole number or a list of them, not {brief(given)}")
    return frozenset(int(value) for value in values)


def _numbering(n_classes: int, ignored: frozenset[int]) -> tuple[dict[int, int] | None, frozenset[int]]:
    """Value -> label, and the values that are ignored: classes have the lowest numbers that are not."""
    values = [value for value in range(n_classes + len(ignored)) if value not in ignored][:n_classes]
    numbers = None if values == [*range(n_classes)] else {value: label for label, value in enumerate(values)}
    return numbers, ignored | ({ignore_label(n_classes)} - {*values})


def _names(path: Path, entries: list[Any]) -> tuple[str, ...]:
    if any(not isinstance(entry, str) for entry in entries):
        raise ValueError(f"{path}: the class list holds names alone, or entries {{id, name, color}} alone")
    names = [entry.strip() for entry in entries]
    if not all(names):
        raise ValueError(f"{path}: a name is empty")
    if twice := _repeated(names):
        raise ValueError(f"{path}: the name {brief(twice)} is listed twice")
    if len(names) > MOST_CLASSES:
        raise ValueError(f"{path}: {len(names)} classes, at most {MOST_CLASSES} are allowed")
    return tuple(names)


def _repeated(names: list[str]) -> str | None:
    """The first name that is listed more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _read_entries(path: Path, entries: list[dict[str, Any]], ignored: frozenset[int]) -> ClassList:
    if any("name" not in entry for entry in entries):
        raise ValueError(f"{path}: every class needs a name")
    ids = [_number(entry.get("id", str(position))) for position, entry in enumerate(entries)]
    # An entry beside the classes whose id is that of ignored pixels is a color of these.
    spare = ignore_label(len(entries) - 1)
    n_classes = len(entries) - ids.count(spare) if ids.count(spare) == 1 else len(entries)
    numbers, ignored = _numbering(n_classes, ignored)
    values = [*numbers] if numbers else [*range(n_classes)]
    by_id = dict(zip(ids, entries, strict=True))
    if not n_classes or set(by_id) - {spare} != set(values):
        asked = f"{values[0]} to {values[-1]}" if values else "none"
        raise ValueError(f"{path}: the ids of {n_classes} classes are {asked}, each once")
    classes = [by_id[value] for value in values]
    metainfo: dict[str, Any] = {"classes": _names(path, [entry["name"] for entry in classes])}
    if not any("color" in entry for entry in entries):
        return ClassList(metainfo, {}, numbers, ignored)
    labels = {value: label for label, value in enumerate(values)}
    colors = {
        _color(path, entry): labels.get(one, ignore_label(n_classes)) for one, entry in zip(ids, entries, strict=True)
    }
    palette = [list(_color(path, entry)) for entry in classes]
    # Two classes of one color cannot be told apart in a picture, but as numbers they can.
    return ClassList(metainfo | {"palette": palette}, colors if len(colors) == len(entries) else {}, numbers, ignored)


def _number(text: Any) -> int | None:
    return int(text) if isinstance(text, str) and text.strip().isdecimal() and len(text) < 10 else None


def _color(path: Path, entry: dict[str, Any]) -> tuple[int, ...]:
    value = entry.get("color")
    numbers = [_number(one) for one in value] if isinstance(value, list) else []
    color = tuple(one for one in numbers if one is not None and one <= 255)
    if len(numbers) != 3 or len(color) != 3:
        raise ValueError(f"{path}: give every class a color [r, g, b] of 0 to 255, or none")
    return color


def _split_folder(folder: Path, split: str) -> Path | None:
    """The subfolder of a split."""
    if not folder.is_dir():
        return None
    found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return next((found[name] for name in SPLITS[split] if name in found), None)


def _split_images(base: Path, split: str) -> tuple[Path, list[Path], list[str]]:
    """The folder of the split's images, their paths in order, and what is to be said of the choice."""
    folder, names_file = base / "images", base / f"{split}.txt"
    image_dir = _split_folder(folder, split)
    if image_dir is not None:
        images = find_images(image_dir)
        notes = _not_taken(image_dir, images)
        if names_file.is_file():
            listed = _named(images, image_dir, base, names_file)
            notes.append(
                f"{names_file} lists {len(listed)} of the {len(images)} images of {image_dir}: these are taken"
            )
            images = listed
        return image_dir, _one_per_stem(images, image_dir), notes
    images = find_images(folder)
    notes = _not_taken(folder, images)
    if names_file.is_file():
        return folder, _one_per_stem(_named(images, folder, base, names_file), folder), notes
    splits = [path for s in SPLITS for path in (_split_folder(folder, s), base / f"{s}.txt") if path and path.exists()]
    named = sorted(path.name for path in folder.iterdir() if path.is_dir() and LOOKS_LIKE_A_SPLIT.match(path.name))
    if splits or named or split == "test":
        there = f"; {folder} has {', '.join(named)}" if named else ""
        raise FileNotFoundError(
            f"folder has no split {split!r}: neither {folder / split} nor {names_file} exists{there}: name split "
            "folders train, val and test, or write lists"
        )
    if len(images) < 2:
        raise FileNotFoundError(
            f"{folder}: {len(images)} images are too few for train and val; {suffixes_below(folder)}"
        )
    notes.append(
        "the split was made by the program: a tenth of the images, chosen by the hash of their names, is val, the "
        "others are train"
    )
    return folder, _tenth(_one_per_stem(images, folder), folder, split), notes


def _not_taken(folder: Path, images: list[Path]) -> list[str]:
    """A sentence about the files below a folder that are no images, if there are some."""
    others = count_suffixes({*files_below(folder)} - {*images})
    return [f"not taken from {folder}: {others}; images are {', '.join(SUFFIXES)}"] if others else []


def _by_stem(paths: Iterable[Path], folder: Path) -> dict[str, Path]:
    """Name below a folder without suffix -> file.

    Raises:
        ValueError: two files differ in their suffix alone.
    """
    found: dict[str, Path] = {}
    for path in paths:
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if stem in found:
            raise ValueError(f"{found[stem]} and {path.name} differ in their suffix alone: keep one of them")
        found[stem] = path
    return found


def _one_per_stem(paths: list[Path], folder: Path) -> list[Path]:
    return list(_by_stem(paths, folder).values())


def _named(images: list[Path], folder: Path, base: Path, names_file: Path) -> list[Path]:
    """The images that a list names, in its order.

    A line is a name below the images, or a path below the root, with or without suffix; lines that begin with "#" are
    comments. What follows a name is left aside; a mask there must be the one of that name.
    """
    by_name: dict[str, list[Path]] = {}
    for path in images:
        for below in {folder, base, base / "images", Path(folder.anchor)}:
            key = path.relative_to(below).as_posix()
            for one in {key, key[: -len(path.suffix)]}:
                by_name.setdefault(one, []).append(path)
    try:
        lines = names_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{names_file}: not a text in UTF-8") from error
    names = [line.strip().replace("\\", "/") for line in lines if line.strip() and not line.startswith("#")]
    found: dict[Path, str] = {}
    for line in names:
        name, *more = [line] if line in by_name else re.split(r"[\s,;]+", line.lstrip("./"))
        if name not in by_name:
            raise FileNotFoundError(f"{names_file}: there is no image {name!r} in {folder}; {suffixes_below(folder)}")
        if len(by_name[name]) > 1:
            several = ", ".join(path.name for path in by_name[name])
            raise ValueError(f"{names_file}: {name} may be {several}: write the suffix too, or keep one of them")
        path = by_name[name][0]
        if path in found:
            raise ValueError(f"{names_file}: {name} is listed twice")
        others = [one for one in more if is_image(Path(one)) and not Path(one).stem.startswith(path.stem)]
        if others:
            raise ValueError(f"{names_file}: {name} has the mask {others[0]}: masks are found by the names of images")
        found[path] = name
    return [*found]


def _tenth(images: list[Path], folder: Path, split: str) -> list[Path]:
    """A tenth of the images, at least one, for `val`, the others for `train`."""

    def key(path: Path) -> str:
        return hashlib.sha1(path.relative_to(folder).as_posix().encode()).hexdigest()

    val = set(sorted(images, key=key)[: max(1, round(len(images) / 10))])
    return [path for path in images if (path in val) == (split == "val")]
