"""The data set `folder`: the user's own images and masks. Imports mmseg.

Structure below the root, with the splits in one of three forms:

    images/<split>/*.jpg|png   annotations/<split>/*.png   split folders
    images/*                   annotations/*.png           and <split>.txt: a name without suffix per line
    images/*                   annotations/*.png           alone: a tenth of the images, chosen by the hash of
                                                           the name, is `val`, the rest `train`

The class list (`classes.yml`) is a list of names or of `{id, name, color: [r, g, b]}`.
"""

import hashlib
from pathlib import Path
from typing import Any

import yaml

from segm.data.images import find_images
from segm.data.layouts import dataset_root
from segm.data.openmmlab import BaseSegDataset
from segm.data.public import open_list
from segm.data.sample import IGNORE_LABEL

SPLITS = ("train", "val", "test")


class OwnFiles(BaseSegDataset):
    """mmsegmentation's data set for images with mixed suffixes, listed beforehand."""

    def __init__(self, images: list[Path], image_dir: Path, label_dir: Path | None, metainfo: dict) -> None:
        self._images, self._label_dir = images, label_dir
        prefix = {"img_path": str(image_dir)}
        super().__init__(img_suffix="", data_prefix=prefix, metainfo=metainfo, lazy_init=True)

    def load_data_list(self) -> list[dict]:
        return [self._data_info(path) for path in self._images]

    def _data_info(self, path: Path) -> dict:
        info: dict[str, Any] = {"img_path": str(path), "label_map": None, "reduce_zero_label": False, "seg_fields": []}
        if self._label_dir is not None:
            relative = path.relative_to(self.data_prefix["img_path"])
            info["seg_map_path"] = str(self._label_dir / relative.with_name(f"{path.stem}.png"))
        return info


def list_folder(split: str, root: str | Path | None, classes: str | Path | None) -> BaseSegDataset:
    """The files of one split.

    Raises:
        ValueError: unknown split, or a wrong class list.
        FileNotFoundError: a folder, the class list or every image is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"folder has no split {split!r}; allowed: {', '.join(SPLITS)}")
    given = dataset_root("folder", root)
    base = next((folder for folder in (given, given / "folder") if (folder / "images").is_dir()), None)
    if base is None:
        tried = f"{given / 'images'} and {given / 'folder/images'}"
        raise FileNotFoundError(f"folder not found: tried {tried}; set DATASET to the folder that holds images")
    metainfo = read_classes(find_classes(base, classes))
    image_dir, images = _split_images(base, split)
    label_dir = base / "annotations" / image_dir.relative_to(base / "images")
    # Only a test set may come without masks; elsewhere a missing folder is a mistake that loading reports.
    labelled = split != "test" or label_dir.is_dir()
    files = OwnFiles(images, image_dir, label_dir if labelled else None, metainfo)
    return open_list(files, f"folder {split}", image_dir)


def find_classes(base: Path, classes: str | Path | None) -> Path:
    """The class list: `classes`, or `classes.yml` or `classes.yaml` below the root."""
    candidates = [Path(classes)] if classes else [base / "classes.yml", base / "classes.yaml"]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no class list: {' or '.join(map(str, candidates))} does not exist")


def read_classes(path: Path) -> dict:
    """`{"classes": names, "palette": colors}` of a class list; mmsegmentation chooses missing colors.

    Raises:
        ValueError: the file is no list of names or of `{id, name, color}` with ids 0, 1, 2, ...
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file ({str(error).splitlines()[0]})") from error
    if not isinstance(entries, list) or not 0 < len(entries) <= IGNORE_LABEL:
        raise ValueError(f"{path}: the class list is a YAML list of 1 to {IGNORE_LABEL} classes")
    if not all(isinstance(entry, dict) for entry in entries):
        return {"classes": _names(path, entries)}
    return _read_entries(path, entries)


def _names(path: Path, entries: list) -> tuple[str, ...]:
    if any(isinstance(entry, (dict, list)) or entry is None for entry in entries):
        raise ValueError(f"{path}: the class list holds names alone, or entries {{id, name, color}} alone")
    return tuple(str(entry) for entry in entries)


def _read_entries(path: Path, entries: list[dict]) -> dict:
    if any("name" not in entry for entry in entries):
        raise ValueError(f"{path}: every class needs a name")
    by_id = {entry.get("id", position): entry for position, entry in enumerate(entries)}
    if set(by_id) != set(range(len(entries))):
        raise ValueError(f"{path}: the ids of {len(entries)} classes are 0 to {len(entries) - 1}, each once")
    ordered = [by_id[i] for i in range(len(entries))]
    metainfo = {"classes": _names(path, [entry["name"] for entry in ordered])}
    colours = [entry["color"] for entry in ordered if "color" in entry]
    if colours and not (len(colours) == len(ordered) and all(_is_colour(colour) for colour in colours)):
        raise ValueError(f"{path}: give every class a color [r, g, b] of 0 to 255, or none")
    return metainfo | ({"palette": colours} if colours else {})


def _is_colour(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(v in range(256) for v in value)


def _split_images(base: Path, split: str) -> tuple[Path, list[Path]]:
    """The folder that the split's images are in, and their paths in sorted order."""
    image_dir, names_file = base / "images" / split, base / f"{split}.txt"
    if image_dir.is_dir():
        return image_dir, find_images(image_dir)
    images = find_images(base / "images")
    if names_file.is_file():
        return base / "images", _named(images, base / "images", names_file)
    others = [path for s in SPLITS for path in (base / "images" / s, base / f"{s}.txt") if path.exists()]
    if others or split == "test":
        raise FileNotFoundError(f"folder has no split {split!r}: neither {image_dir} nor {names_file} exists")
    return base / "images", _tenth(images, base / "images", split)


def _named(images: list[Path], folder: Path, names_file: Path) -> list[Path]:
    by_name = {path.relative_to(folder).with_suffix("").as_posix(): path for path in images}
    names = [line.strip() for line in names_file.read_text(encoding="utf-8").splitlines() if line.strip()]
    for name in names:
        if name not in by_name:
            raise FileNotFoundError(f"{names_file}: there is no image {name!r} in {folder}")
    return [by_name[name] for name in names]


def _tenth(images: list[Path], folder: Path, split: str) -> list[Path]:
    """A tenth of the images, at least one, for `val`, the others for `train`."""

    def key(path: Path) -> str:
        return hashlib.sha1(path.relative_to(folder).as_posix().encode()).hexdigest()

    val = set(sorted(images, key=key)[: max(1, round(len(images) / 10))])
    return [path for path in images if (path in val) == (split == "val")]
