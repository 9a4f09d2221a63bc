"""Speed of models, compared inside one run."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm


def interleaved_rates(
    calls: Mapping[Any, Callable[[Any], Any]],
    batches: Sequence[Any],
    device: torch.device,
    *,
    repeats: int = 3,
    warmup: int = 2,
    progress: bool = False,
) -> dict[Any, Tensor]:
    """Speed of several functions, each the median of its turns; arguments as for `interleaved_turns`.

    Returns:
        name -> (len(batches),) images/s, float64.
    """
    turns = interleaved_turns(calls, batches, device, repeats=repeats, warmup=warmup, progress=progress)
    return {name: rates.quantile(0.5, dim=1) for name, rates in turns.items()}


@torch.inference_mode()
def interleaved_turns(
    calls: Mapping[Any, Callable[[Any], Any]],
    batches: Sequence[Any],
    device: torch.device,
    *,
    repeats: int = 3,
    warmup: int = 2,
    settled: bool = False,
    progress: bool = False,
) -> dict[Any, Tensor]:
    """Speed of several functions in every turn, interleaved call by call so that they meet the same conditions; each in
    turn is the first, since what ran before leaves its marks on caches and memory.

    Where a machine's speed drifts, the median ratio of two functions over the turns is steadier than the ratio of
    their medians.

    Args:
        calls: name -> function of a batch (B, 3, H, W).
        batches: sequence of batches; each is read once and passed to every function `repeats` times.
        device: torch.device, waited for before and after every call.
        repeats: timed calls of each function per batch.
        warmup: untimed calls of each function, with the first batch.
        settled: an untimed call before every timed one, as in a stream of images through one model: weights and memory
            that another model has pushed out of the caches would count against the faster one.
        progress: show a bar.

    Returns:
        name -> (len(batches), repeats) images/s, float64.
    """
    names, rates = list(calls), {name: list[Tensor]() for name in calls}
    for index, batch in enumerate(tqdm(batches, desc="timing", unit="batch", leave=False, disable=not progress)):
        if index == 0:
            for call in calls.values():
                for _ in range(warmup):
                    call(batch)
        seconds = {name: list[float]() for name in calls}
        for turn in range(repeats):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                if settled:
                    calls[name](batch)
                start = _now(device)
                calls[name](batch)
                seconds[name].append(_now(device) - start)
        for name, values in seconds.items():
            rates[name].append(len(batch) / torch.tensor(values, dtype=torch.float64))
    return {name: torch.stack(values) for name, values in rates.items()}


def _now(device: torch.device) -> float:
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
