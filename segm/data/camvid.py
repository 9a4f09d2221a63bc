"""CamVid in SegNet's split: 11 classes, void ignored. Imports mmseg."""

from typing import Any

from segm.data.openmmlab import BaseSegDataset

# Colors of the CamVid database for the 11 merged classes.
CLASSES = {
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
        "classes": (*CLASSES, "void"),
        "palette": [*CLASSES.values(), (0, 0, 0)],
    }

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(metainfo={"classes": tuple(CLASSES)}, **kwargs)
