"""How the public data sets lie on disk (mmsegmentation's documentation), and how their folder is found."""

import os
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Split:
    """Folders and, where there is one, the file with the names; relative to the data set's folder."""

    images: str
    labels: str | None
    names: str = ""


@dataclass(frozen=True)
class Layout:
    """folders: where the data set may lie below $DATASET; marker: a folder that only this data set has, by
    default the image folder of any split; any_suffix: whether its images are released, or kept by people, in other
    formats than JPEG; options: arguments of mmsegmentation's class."""

    mmseg_class: str
    folders: tuple[str, ...]
    splits: dict[str, Split]
    marker: str = ""
    any_suffix: bool = False
    options: dict = field(default_factory=dict)

    @property
    def markers(self) -> tuple[str, ...]:
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
    {
        **_by_folder("leftImg8bit", "gtFine", train="train", val="val"),
        # The labels of the test set are not public.
        "test": Split("leftImg8bit/test", None),
    },
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

LAYOUTS = {
    "ade20k": _ADE20K,
    "ade20k_large": _ADE20K,
    "cityscapes": _CITYSCAPES,
    "cityscapes_large": _CITYSCAPES,
    "pascal_context": _PASCAL_CONTEXT,
    "coco_stuff": _COCO_STUFF_10K,
    "coco_stuff164k": _COCO_STUFF_164K,
    "camvid": _CAMVID,
}


def dataset_root(name: str, root: str | Path | None) -> Path:
    """`root`, or $DATASET where it is None; absolute.

    Raises:
        FileNotFoundError: neither is given.
    """
    root = root or os.environ.get("DATASET")
    if not root:
        raise FileNotFoundError(f"{name} needs files: set DATASET to its folder or to the one that holds it")
    return Path(root).expanduser().absolute()


def find_folder(name: str, root: str | Path | None) -> Path:
    """Folder of a public data set: `root` itself or one of the usual folders below it.

    Raises:
        FileNotFoundError: none of them has the data set's structure.
    """
    layout, base = LAYOUTS[name], dataset_root(name, root)
    candidates = [base, *(base / folder for folder in layout.folders)]
    for candidate in candidates:
        if any((candidate / marker).is_dir() for marker in layout.markers):
            return candidate
    tried = ", ".join(str(candidate) for candidate in candidates)
    wanted = " or ".join(layout.markers)
    raise FileNotFoundError(
        f"{name} not found: no {wanted} below {tried}; set DATASET to its folder or to the one that holds it"
    )
