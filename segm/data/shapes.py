"""The data set `shapes`: small landscapes drawn in memory, for tests and for the demo; needs no files.

Color is a hint, not the answer: sky and water share blues, grass and trees greens, roads and mountains greys, cars and
the rims of signs reds. What tells them apart is texture, shape and place.
"""

from typing import Any

import numpy as np

from segm.data.dataset import SegmentationDataset
from segm.data.sample import Sample
from segm.data.scene import CLASSES, draw_scene

LENGTHS = {"train": 2000, "val": 50}


class ShapesDataset(SegmentationDataset):
    """Scenes drawn on demand, each from (seed, split, index) alone."""

    def __init__(self, split: str, *, length: int | None = None, **settings: Any) -> None:
        if split not in LENGTHS:
            raise ValueError(f"shapes has no split {split!r}; allowed: {', '.join(LENGTHS)}")
        if length is not None and length < 1:
            raise ValueError(f"length is the number of scenes, at least 1, not {length}")
        super().__init__("shapes", split, tuple(CLASSES), np.array(list(CLASSES.values())), **settings)
        self._length = length or LENGTHS[split]

    def __len__(self) -> int:
        return self._length

    def name_of(self, index: int) -> str:
        return f"{self.split}_{index:05d}"

    def load(self, index: int) -> Sample:
        size = self.image_size
        height, width = size if isinstance(size, tuple) else (size, size)
        # The split's number keeps the scenes of train and val apart.
        stream = list(LENGTHS).index(self.split)
        rng = np.random.default_rng(np.random.SeedSequence((self.seed, stream, index)))
        image, label = draw_scene(rng, height, width)
        return Sample(self.name_of(index), image, label)
