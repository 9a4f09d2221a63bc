"""What a figure was measured with."""

import platform

import timm
import torch

from segm.model.linear import processor_name


def environment(device: torch.device) -> dict[str, str | int]:
    """Device, its threads and the versions that matter for speed, as JSON takes them.

    Args:
        device: torch.device.
    """
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor and the number of threads that are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n_threads = torch.get_num_threads()
    return f"{processor_name()}, {n_threads} thread{'s' if n_threads > 1 else ''}"
