"""The public data sets: how they lie on disk (mmsegmentation's documentation) and their files. Imports mmseg."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segm.data.images import is_image, suffixes_below
from segm.data.openmmlab import BaseSegDataset, mmseg_datasets


@dataclass(frozen=True)
class Split:
    """Folders and the file with the names, "" where all images belong to it; relative to the data set's folder."""

    images: str
    labels: str | None
    names: str = ""


@dataclass(frozen=True)
class Layout:
    """The place and the structure of a data set.

    Attributes:
        mmseg_class: name of the class of mmsegmentation that lists its files.
        folders: where it may lie below $DATASET.
        splits: by name.
        marker: a folder that only this data set has; "": the image folder of any split.
        any_suffix: whether its images are released, or kept by people, in other formats than JPEG.
        options: arguments of mmsegmentation's class.
    """

    mmseg_class: str
    folders: tuple[str, ...]
    splits: dict[str, Split]
    marker: str = ""
    any_suffix: bool = False
    options: dict = field(default_factory=dict)

    @property
    def markers(self) -> tuple[str, ...]:
        """Folders by which the data set is found."""
        return (self.marker,) if self.marker else tuple(split.images for split in self.splits.values())


def _by_folder(images: str, labels: str, **folders: str) -> dict[str, Split]:
    return {split: Split(f"{images}/{folder}", f"{labels}/{folder}") for split, folder in folders.items()}


_ADE20K = Layout(
    "ADE20KDataset",
    ("ADEChallengeData2016", "ade20k", "ade20k/ADEChallengeData2016", "ade", "ade/ADEChallengeData2016"),
    _by_folder("images", "annotations", train="training", val="validation"),
    any_suffix=True,
)
_CITYSCAPES = Layout(
    "CityscapesDataset",
    ("cityscapes",),
    _by_folder("leftImg8bit", "gtFine", train="train", val="val") | {"test": Split("leftImg8bit/test", None)},
)
_VOC2010 = ("VOCdevkit/VOC2010", "VOC2010")
_PASCAL_CONTEXT = Layout(
    "PascalContextDataset",
    (*_VOC2010, *(f"{folder}/{voc}" for folder in ("pascal_context", "pcontext") for voc in ("", *_VOC2010))),
    {
        split: Split("JPEGImages", "SegmentationClassContext", f"ImageSets/SegmentationContext/{split}.txt")
        for split in ("train", "val")
    },
    marker="SegmentationClassContext",
)
_COCO_STUFF_10K = Layout(
    "COCOStuffDataset",
    ("coco_stuff10k", "coco_stuff"),
    _by_folder("images", "annotations", train="train2014", val="test2014"),
    options={"reduce_zero_label": True},
)
_COCO_STUFF_164K = Layout(
    "COCOStuffDataset",
    ("coco_stuff164k",),
    _by_folder("images", "annotations", train="train2017", val="val2017"),
)
_CAMVID = Layout(
    "CamVidDataset",
    ("camvid", "CamVid"),
    _by_folder("images", "annotations", train="train", val="val", test="test"),
    any_suffix=True,
)
_SUIM = Layout(
    "SuimDataset",
    ("suim", "SUIM"),
    _by_folder("images", "annotations", train="train", val="test", test="test"),  # it has no validation set of its own
)
_RUMEXWEEDS = Layout(
    "RumexWeedsDataset",
    ("rumexweeds", "RumexWeeds"),
    _by_folder("images", "annotations", train="train", val="val", test="test"),
    any_suffix=True,
)

LAYOUTS = {
    "ade20k": _ADE20K,
    "ade20k_large": _ADE20K,
    "cityscapes": _CITYSCAPES,
    "cityscapes_large": _CITYSCAPES,
    "pascal_context": _PASCAL_CONTEXT,
    "coco_stuff": _COCO_STUFF_10K,
    "coco_stuff164k": _COCO_STUFF_164K,
    "camvid": _CAMVID,
    "suim": _SUIM,
    "rumexweeds": _RUMEXWEEDS,
}

# Colors of the CamVid database for the 11 merged classes.
CAMVID_CLASSES = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (0, 0, 192),
    "tree": (128, 128, 0),
    "sign-symbol": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


class CamVidDataset(BaseSegDataset):
    """Labels 0-10 in the order above, 11 = void: left out of the classes, mmsegmentation maps it to 255."""

    METAINFO = {  # noqa: RUF012 -- mmsegmentation's convention
        "classes": (*CAMVID_CLASSES, "void"),
        "palette": [*CAMVID_CLASSES.values(), (0, 0, 0)],
    }

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(metainfo={"classes": tuple(CAMVID_CLASSES)}, **kwargs)


class SuimDataset(BaseSegDataset):
    """Labels 0-7: the bits of red, green and blue of the colors of the release."""

    METAINFO = {  # noqa: RUF012 -- mmsegmentation's convention
        "classes": ("background", "diver", "plant", "wreck", "robot", "reef", "fish", "sea floor"),
        "palette": [(255 * (label >> 2), 255 * (label >> 1 & 1), 255 * (label & 1)) for label in range(8)],
    }


class RumexWeedsDataset(BaseSegDataset):
    """Labels 0-2; boxes of weeds whose pixels nobody marked are 255."""

    METAINFO = {  # noqa: RUF012 -- mmsegmentation's convention
        "classes": ("background", "rumex obtusifolius", "rumex crispus"),
        "palette": [(70, 90, 50), (255, 215, 0), (255, 69, 0)],
    }


OWN = {one.__name__: one for one in (CamVidDataset, SuimDataset, RumexWeedsDataset)}  # that mmsegmentation lacks


def mmseg_class(name: str) -> type[BaseSegDataset]:
    """The class that lists the files of a data set and knows its classes."""
    class_name = LAYOUTS[name].mmseg_class
    return OWN.get(class_name) or getattr(mmseg_datasets, class_name)


def list_public(name: str, split: str, root: Path) -> BaseSegDataset:
    """The files of one split of a data set at `root` or below it.

    Raises:
        ValueError: there is no such split.
        FileNotFoundError: the folder is missing or empty.
    """
    layout = LAYOUTS[name]
    if split not in layout.splits:
        raise ValueError(f"{name} has no split {split!r}; allowed: {', '.join(layout.splits)}")
    folder, parts = _find_folder(name, root), layout.splits[split]
    for path in (folder / parts.images, folder / parts.names):
        if not path.exists():
            raise FileNotFoundError(f"the split {split!r} of {name} is missing: {path} does not exist")
    prefix = {"img_path": str(folder / parts.images)}
    if parts.labels:
        prefix["seg_map_path"] = str(folder / parts.labels)
    names = str(folder / parts.names) if parts.names else ""
    options = layout.options | (_suffix(folder / parts.images) if layout.any_suffix else {})
    files = mmseg_class(name)(ann_file=names, data_prefix=prefix, lazy_init=True, **options)
    return open_list(files, f"{name} {split}", Path(prefix["img_path"]))


def _find_folder(name: str, root: Path) -> Path:
    """The folder of a data set: `root` itself or one of the usual folders below it."""
    layout = LAYOUTS[name]
    candidates = [root, *(root / folder for folder in layout.folders)]
    for candidate in candidates:
        if any((candidate / marker).is_dir() for marker in layout.markers):
            return candidate
    tried, wanted = ", ".join(map(str, candidates)), " or ".join(layout.markers)
    raise FileNotFoundError(
        f"{name} not found: no {wanted} below {tried}; set DATASET to its folder or to the one that holds it"
    )


def _suffix(folder: Path) -> dict[str, str]:
    """The option of mmsegmentation's class for images that all have one other suffix than the published .jpg."""
    found = {path.suffix for path in folder.iterdir() if is_image(path)}
    return {"img_suffix": found.pop()} if len(found) == 1 and ".jpg" not in found else {}


def open_list(files: BaseSegDataset, what: str, where: Path) -> BaseSegDataset:
    """Read the file list.

    Args:
        files: list that is not read yet.
        what, where: name of the data set and its split, and their folder, for the error.

    Raises:
        FileNotFoundError: it is empty, on which mmengine fails with an error of numpy.
    """
    try:
        files.full_init()
    except ValueError:
        if files.data_list:
            raise
        wanted = f" with the suffix {files.img_suffix}" if files.img_suffix else ""
        raise FileNotFoundError(f"{what}: no image{wanted} in {where}; {suffixes_below(where)}") from None
    return files
