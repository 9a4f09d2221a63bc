"""Speed of several functions inside one run, interleaved, and what it says of operations that are saved.

"Trials" are the rates of `interleaved_trials`: (batches, trials), images/s.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

Call = Callable[[Any], Any]


@torch.inference_mode()
def interleaved_trials(
    calls: Mapping[Any, Call],
    batches: Sequence[Any],
    device: torch.device,
    *,
    repeats: int = 3,
    warmup: int = 2,
    warm: bool = False,
    progress: bool = False,
) -> dict[Any, Tensor]:
    """Speed of several functions in every trial, interleaved call by call so that all meet the same conditions.

    Each function goes first in turn, since the call before leaves its marks on caches and memory. Where a machine's
    speed drifts, the median ratio of two functions over the trials is steadier than the ratio of their medians.

    Args:
        calls: name -> function of a batch (B, 3, H, W).
        batches: each is read once and passed to every function `repeats` times.
        device: waited for before and after every call.
        repeats: timed calls of each function per batch.
        warmup: untimed calls of each function, with the first batch.
        warm: an untimed call before every timed one, as in a stream of images through one model: weights and memory
            that another model has pushed out of the caches would count against the faster one.
        progress: show a bar.

    Returns:
        name -> (len(batches), repeats) images/s, float64.
    """
    names, rates = list(calls), {name: list[Tensor]() for name in calls}
    for index, batch in enumerate(tqdm(batches, desc="timing", unit="batch", leave=False, disable=not progress)):
        for call in calls.values():
            for _ in range(warmup if index == 0 else 0):
                call(batch)
        seconds = {name: list[float]() for name in calls}
        for trial in range(repeats):
            for name in names[trial % len(names) :] + names[: trial % len(names)]:
                if warm:
                    calls[name](batch)
                start = _now(device)
                calls[name](batch)
                seconds[name].append(_now(device) - start)
        for name, values in seconds.items():
            rates[name].append(len(batch) / torch.tensor(values, dtype=torch.float64))
    return {name: torch.stack(values) for name, values in rates.items()}


def _now(device: torch.device) -> float:
    """Seconds, once the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def speed(trials: Tensor) -> float:
    """Images/s over all batches, each at the median of its trials."""
    return 1 / (1 / trials.quantile(0.5, dim=1)).mean().item()


def share_of_time(others: Tensor, trials: Tensor) -> float:
    """Time per pass as a share of another's: the median over the trials of a batch, then the mean over the batches.

    In a trial both ran one after the other, so that a machine whose speed drifts changes little.

    Args:
        others, trials: (batches, trials), images/s.
    """
    return (others / trials).quantile(0.5, dim=1).mean().item()


def ratio(trials: Tensor, others: Tensor) -> float:
    """Speed over all batches against another's, which takes the same time for each; as in `share_of_time`."""
    return 1 / share_of_time(others, trials)


def realized_share(trials: Tensor, pure_trials: Tensor, operations: float, pure_operations: float) -> float:
    """(speed merged ÷ speed pure) ÷ (operations pure ÷ operations merged); 1: all saved operations are saved time."""
    return ratio(trials, pure_trials) / (pure_operations / operations)
