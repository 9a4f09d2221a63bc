"""The public data sets, listed by mmsegmentation's classes. Imports mmseg."""

from pathlib import Path

from segm.data.camvid import CamVidDataset
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
    files = mmseg_class(name)(ann_file=names, data_prefix=prefix, lazy_init=True, **layout.options)
    return open_list(files, f"{name} {split}", names or prefix["img_path"])


def _require_split(name: str, split: str, folder: Path, parts: Split) -> None:
    for path in (folder / parts.images, folder / parts.names):
        if not path.exists():
            raise FileNotFoundError(f"the split {split!r} of {name} is missing: {path} does not exist")


def open_list(files: BaseSegDataset, what: str, where: str | Path) -> BaseSegDataset:
    """Reads the file list; FileNotFoundError if it is empty, on which mmengine fails with a numpy error."""
    try:
        files.full_init()
    except ValueError:
        if files.data_list:
            raise
        raise FileNotFoundError(f"{what}: no image in {where}") from None
    return files
