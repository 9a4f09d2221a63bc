"""The public data sets, listed by mmsegmentation's classes. Imports mmseg."""

from pathlib import Path

from segm.data.camvid import CamVidDataset
from segm.data.images import is_image, suffixes_below
from segm.data.layouts import LAYOUTS, Split, find_folder
from segm.data.openmmlab import BaseSegDataset, mmseg_datasets


def mmseg_class(name: str) -> type[BaseSegDataset]:
    """Class that lists the files of the data set `name` and knows its classes."""
    class_name = LAYOUTS[name].mmseg_class
    return CamVidDataset if class_name == "CamVidDataset" else getattr(mmseg_datasets, class_name)


def list_public(name: str, split: str, root: str | Path | None) -> BaseSegDataset:
    """The files of one split.

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: the folder is missing or empty.
    """
    layout = LAYOUTS[name]
    if split not in layout.splits:
        raise ValueError(f"{name} has no split {split!r}; allowed: {', '.join(layout.splits)}")
    folder, parts = find_folder(name, root), layout.splits[split]
    _require_split(name, split, folder, parts)
    prefix = {"img_path": str(folder / parts.images)}
    if parts.labels:
        prefix["seg_map_path"] = str(folder / parts.labels)
    names = str(folder / parts.names) if parts.names else ""
    options = dict(layout.options)
    suffix = other_suffix(folder / parts.images, ".jpg") if layout.any_suffix else None
    if suffix:
        options["img_suffix"] = suffix
    files = mmseg_class(name)(ann_file=names, data_prefix=prefix, lazy_init=True, **options)
    return open_list(files, f"{name} {split}", Path(prefix["img_path"]))


def _require_split(name: str, split: str, folder: Path, parts: Split) -> None:
    for path in (folder / parts.images, folder / parts.names):
        if not path.exists():
            raise FileNotFoundError(f"the split {split!r} of {name} is missing: {path} does not exist")


def other_suffix(folder: Path, expected: str) -> str | None:
    """The suffix of all images in a folder, where it is another one than the data set is published with."""
    found = {path.suffix for path in folder.iterdir() if is_image(path)}
    return found.pop() if len(found) == 1 and expected not in found else None


def open_list(files: BaseSegDataset, what: str, where: Path) -> BaseSegDataset:
    """Reads the file list; FileNotFoundError if it is empty, on which mmengine fails with a numpy error."""
    try:
        files.full_init()
    except ValueError:
        if files.data_list:
            raise
        wanted = f" with the suffix {files.img_suffix}" if files.img_suffix else ""
        raise FileNotFoundError(f"{what}: no image{wanted} in {where}; {suffixes_below(where)}") from None
    return files
