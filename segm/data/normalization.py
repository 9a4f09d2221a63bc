"""Color normalization of the pretrained backbones."""

from typing import NamedTuple

import numpy as np
import torch


class Normalization(NamedTuple):
    """Mean and standard deviation per RGB channel, for values in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


NORMALIZATION = {
    "vit": Normalization(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "deit": Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
}


def get_normalization(name: str) -> Normalization:
    """Raises ValueError, with the allowed names, for an unknown one."""
    if name not in NORMALIZATION:
        raise ValueError(f"unknown normalization {name!r}; allowed: {', '.join(NORMALIZATION)}")
    return NORMALIZATION[name]


def normalize(image: np.ndarray, normalization: str) -> torch.Tensor:
    """image: uint8 RGB (H, W, 3) -> float32 (3, H, W), contiguous."""
    mean, std = get_normalization(normalization)
    # numpy, not torch: torch's threads make this several times slower where other processes share the cores.
    pixels = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    pixels -= 255 * np.array(mean, np.float32)[:, None, None]
    pixels /= 255 * np.array(std, np.float32)[:, None, None]
    return torch.from_numpy(pixels)
