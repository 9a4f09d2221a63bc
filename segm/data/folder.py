"""The data set `folder`: the user's own images and masks. Imports mmseg.

Structure below the root, with the splits in one of three forms:

    images/<split>/*           annotations/<split>/*       split folders: train, val, test, or training, validation,
                                                           testing, as they are often called
    images/*                   annotations/*               and <split>.txt: a name per line, with or without suffix
    images/*                   annotations/*               alone: a tenth of the images, chosen by the hash of
                                                           the name, is `val`, the rest `train`

The class list (`classes.yml`) is a list of names or of `{id, name, color: [r, g, b]}`. Where every class has a color,
masks may be RGB pictures in these colors; an entry with the id 255 is a color that is ignored.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from segm.data.dataset import IGNORE_LABEL
from segm.data.images import find_images, suffixes_below
from segm.data.openmmlab import BaseSegDataset
from segm.data.public import open_list
from segm.errors import brief
from segm.storage import read_yaml

# Names of the folders of a split, in either case.
SPLITS = {"train": ("train", "training"), "val": ("val", "validation", "valid"), "test": ("test", "testing")}
LOOKS_LIKE_A_SPLIT = re.compile(r"(train|val|test|dev|eval|hold)", re.IGNORECASE)


class OwnFiles(BaseSegDataset):
    """mmsegmentation's data set for images and masks with mixed suffixes, listed beforehand.

    Attributes:
        colors: (r, g, b) -> label, of masks that are RGB pictures.
        made: the way in which the program made the split; empty where it did not.
    """

    def __init__(
        self,
        images: list[Path],
        image_dir: Path,
        label_dir: Path | None,
        metainfo: dict[str, Any],
        colors: Mapping[tuple[int, ...], int] | None = None,
        made: str = "",
    ) -> None:
        self._images, self._label_dir = images, label_dir
        self._masks = _by_stem(find_images(label_dir), label_dir) if label_dir is not None else {}
        self.colors, self.made = colors or {}, made
        prefix = {"img_path": str(image_dir)}
        super().__init__(img_suffix="", data_prefix=prefix, metainfo=metainfo, lazy_init=True)

    def load_data_list(self) -> list[dict[str, Any]]:
        """mmsegmentation's entry of every image."""
        return [self._data_info(path) for path in self._images]

    def _data_info(self, path: Path) -> dict[str, Any]:
        info: dict[str, Any] = {"img_path": str(path), "label_map": None, "reduce_zero_label": False, "seg_fields": []}
        if self._label_dir is not None:
            stem = path.relative_to(self.data_prefix["img_path"]).with_suffix("")
            expected = self._label_dir / stem.with_name(f"{stem.name}.png")
            info["seg_map_path"] = str(self._masks.get(stem.as_posix(), expected))
        return info

    @property
    def masks_without_image(self) -> list[Path]:
        """Masks that belong to no image of the folder, whatever its split."""
        folder = Path(self.data_prefix["img_path"])
        images = {path.relative_to(folder).with_suffix("").as_posix() for path in find_images(folder)}
        return [path for stem, path in self._masks.items() if stem not in images]


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
    metainfo, colors = read_classes(find_classes(base, classes))
    image_dir, images, made = _split_images(base, split)
    label_dir = base / "annotations" / image_dir.relative_to(base / "images")
    if not label_dir.is_dir() and image_dir != base / "images":  # the masks' folder may be called otherwise
        label_dir = _split_folder(base / "annotations", split) or label_dir
    if not images:
        raise FileNotFoundError(f"folder {split}: no image in {image_dir}; {suffixes_below(image_dir)}")
    # Only a test set may come without masks; elsewhere a missing folder is a mistake that loading reports.
    labelled = split != "test" or label_dir.is_dir()
    files = OwnFiles(images, image_dir, label_dir if labelled else None, metainfo, colors, made)
    return open_list(files, f"folder {split}", image_dir)


def own_classes(file: str | Path) -> dict[str, Any]:
    """`{"classes": names, "palette": colors}` of a class list; missing colors are chosen by mmsegmentation.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: see `read_classes`.
    """
    path = find_classes(Path(), file)
    return OwnFiles([], path.parent, None, read_classes(path)[0]).metainfo


def find_classes(base: Path, classes: str | Path | None) -> Path:
    """The file with the class list: `classes`, or `classes.yml` or `classes.yaml` below the root."""
    candidates = [Path(classes)] if classes else [base / "classes.yml", base / "classes.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no class list: {' or '.join(map(str, candidates))} does not exist")


def read_classes(path: Path) -> tuple[dict[str, Any], dict[tuple[int, ...], int]]:
    """A class list: `{"classes": names, "palette": colors}` and (r, g, b) -> label for masks in these colors.

    The palette is left out where the list has no colors. Names are texts, whatever YAML means by them: `no` is a class
    like any other.

    Raises:
        ValueError: the file is no list of names or of `{id, name, color}` with ids 0, 1, 2, ... and 255.
    """
    entries = read_yaml(path, yaml.BaseLoader)
    if not isinstance(entries, list) or not 0 < len(entries) <= IGNORE_LABEL + 1:
        raise ValueError(f"{path}: the class list is a YAML list of 1 to {IGNORE_LABEL} classes")
    if not all(isinstance(entry, dict) for entry in entries):
        return {"classes": _names(path, entries)}, {}
    return _read_entries(path, entries)


def _names(path: Path, entries: list[Any]) -> tuple[str, ...]:
    if any(not isinstance(entry, str) for entry in entries):
        raise ValueError(f"{path}: the class list holds names alone, or entries {{id, name, color}} alone")
    names = [entry.strip() for entry in entries]
    if not all(names):
        raise ValueError(f"{path}: a name is empty")
    if twice := _repeated(names):
        raise ValueError(f"{path}: the name {brief(twice)} is listed twice")
    if len(names) > IGNORE_LABEL:
        raise ValueError(f"{path}: {len(names)} classes, at most {IGNORE_LABEL} are allowed")
    return tuple(names)


def _repeated(names: list[str]) -> str | None:
    """The first name that is listed more than once."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _read_entries(path: Path, entries: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[tuple[int, ...], int]]:
    if any("name" not in entry for entry in entries):
        raise ValueError(f"{path}: every class needs a name")
    ids = [_number(entry.get("id", str(position))) for position, entry in enumerate(entries)]
    n_classes = len(entries) - ids.count(IGNORE_LABEL)
    by_id = dict(zip(ids, entries, strict=True))
    if not n_classes or set(by_id) - {IGNORE_LABEL} != set(range(n_classes)):
        raise ValueError(f"{path}: the ids of {n_classes} classes are 0 to {n_classes - 1}, each once")
    classes = [by_id[index] for index in range(n_classes)]
    metainfo: dict[str, Any] = {"classes": _names(path, [entry["name"] for entry in classes])}
    if not any("color" in entry for entry in entries):
        return metainfo, {}
    labels = {
        _color(path, entry): IGNORE_LABEL if label is None else label for label, entry in zip(ids, entries, strict=True)
    }
    palette = [list(_color(path, entry)) for entry in classes]
    # Two classes of one color cannot be told apart in a picture, but as numbers they can.
    return metainfo | {"palette": palette}, labels if len(labels) == len(entries) else {}


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


def _split_images(base: Path, split: str) -> tuple[Path, list[Path], str]:
    """The folder of the split's images, their paths in sorted order, and how the program chose them, if it did."""
    folder, names_file = base / "images", base / f"{split}.txt"
    image_dir = _split_folder(folder, split)
    if image_dir is not None:
        return image_dir, _one_per_stem(find_images(image_dir), image_dir), ""
    images = find_images(folder)
    if names_file.is_file():
        return folder, _one_per_stem(_named(images, folder, names_file), folder), ""
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
    made = "a tenth of the images, chosen by the hash of their names, is val, the others are train"
    return folder, _tenth(_one_per_stem(images, folder), folder, split), made


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


def _named(images: list[Path], folder: Path, names_file: Path) -> list[Path]:
    """The images that a list names, in its order."""
    by_name: dict[str, list[Path]] = {}
    for path in images:
        below = path.relative_to(folder)
        for key in (below.as_posix(), below.with_suffix("").as_posix()):
            by_name.setdefault(key, []).append(path)
    try:
        lines = names_file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{names_file}: not a text in UTF-8") from error
    names = [line.strip().replace("\\", "/") for line in lines if line.strip()]
    if twice := _repeated(names):
        raise ValueError(f"{names_file}: {twice} is listed twice")
    for name in names:
        if name not in by_name:
            raise FileNotFoundError(f"{names_file}: there is no image {name!r} in {folder}; {suffixes_below(folder)}")
        if len(by_name[name]) > 1:
            found = ", ".join(path.name for path in by_name[name])
            raise ValueError(f"{names_file}: {name} may be {found}: write the suffix too, or keep one of them")
    return [by_name[name][0] for name in names]


def _tenth(images: list[Path], folder: Path, split: str) -> list[Path]:
    """A tenth of the images, at least one, for `val`, the others for `train`."""

    def key(path: Path) -> str:
        return hashlib.sha1(path.relative_to(folder).as_posix().encode()).hexdigest()

    val = set(sorted(images, key=key)[: max(1, round(len(images) / 10))])
    return [path for path in images if (path in val) == (split == "val")]
