"""Pictures as files."""

from pathlib import Path

import cv2
import numpy as np


def write_picture(file: Path, picture: np.ndarray) -> None:
    """Write a picture, (H, W, 3) uint8 RGB, or a label map, (H, W) uint8; folders are made.

    Raises:
        OSError: it cannot be written there.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(file), picture[..., ::-1] if picture.ndim == 3 else picture):
        raise OSError(f"cannot write {file}")
