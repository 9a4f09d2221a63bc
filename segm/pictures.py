"""Pictures as files."""

from pathlib import Path

import cv2
import numpy as np

from segm.files import atomic


def write_picture(file: Path, picture: np.ndarray) -> None:
    """Write a picture, (H, W, 3) uint8 RGB, or a label map, (H, W) uint8, in one step; folders are made.

    A link that lies in the way is replaced, not followed.

    Raises:
        OSError: it cannot be written there.
    """
    # cv2.imwrite ends the program at a name that is no UTF-8.
    _, encoded = cv2.imencode(file.suffix, picture[..., ::-1] if picture.ndim == 3 else picture)
    with atomic(file) as part:
        part.write_bytes(encoded.tobytes())
