"""Speed of models, compared inside one run, and the machine that it was measured on."""

import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from patch.trials import Call, interleaved_trials
from segm.model.linear import processor_name

COMPILING_PASSES = 3  # of every shape: compile, record a CUDA graph, replay it


def interleaved_rates(
    calls: Mapping[Any, Call],
    batches: Sequence[Any],
    device: torch.device,
    *,
    repeats: int = 3,
    warmup: int = 2,
    progress: bool = False,
) -> dict[Any, Tensor]:
    """Speed of several functions, each the median of its trials; arguments as for `interleaved_trials`.

    Returns:
        name -> (len(batches),) images/s, float64.
    """
    trials = interleaved_trials(calls, batches, device, repeats=repeats, warmup=warmup, progress=progress)
    return {name: rates.quantile(0.5, dim=1) for name, rates in trials.items()}


@torch.inference_mode()
def warm_up_shapes(calls: Mapping[str, Call], batches: Sequence[Tensor]) -> None:
    """Let compiled models see every number of tokens of the batches, (B, 3, H, W) each, before they are timed."""
    for batch in tqdm(batches, desc="compiling", unit="batch", leave=False):
        for call in calls.values():
            for _ in range(COMPILING_PASSES):
                call(batch)


def environment(device: torch.device) -> dict[str, str | int]:
    """Device, its threads and the versions that matter for speed, as JSON takes them."""
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": version("timm"),
    }


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor and the number of threads that are used."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    n_threads = torch.get_num_threads()
    return f"{processor_name()}, {n_threads} thread{'s' if n_threads > 1 else ''}"
