"""An image with its label map, as it is on disk."""

from dataclasses import dataclass

import numpy as np

IGNORE_LABEL = 255


@dataclass(frozen=True)
class Sample:
    """One evaluation sample at its original size."""

    name: str  # path of the image below the split's folder, without suffix; "/" between folders
    image: np.ndarray  # uint8 RGB (H, W, 3)
    label: np.ndarray | None  # uint8 (H, W), 255 = ignore; None if the split has no labels
