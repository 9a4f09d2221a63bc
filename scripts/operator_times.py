"""The time of merges and passes, operator by operator."""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from method_cost import Merges
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

import patch
from segm.model.segmenter import Segmenter

OUTSIDE = "outside"  # of PyTorch's operators: Python, NumPy, OpenCV


@torch.inference_mode()
def profile_merges(
    model: Segmenter, method: str, options: Mapping[str, Any], batch: Tensor, device: torch.device, repeats: int = 20
) -> list[dict[str, Any]]:
    """Time of the merges of one pass by operator; a plain pass before each keeps the caches as they are in use.

    Args:
        model: unpatched.
        method, options: for `patch.apply`.
        batch: (B, 3, H, W), on the device.

    Returns:
        list of `operator`, `calls` per pass and `share` of the time that the profiler saw, the longest first; the time
        in no operator of PyTorch's is called "outside".
    """
    merged = patch.apply(copy.deepcopy(model), method, **options)
    merges, merge = Merges.record(merged, batch), patch.find(method).merge
    totals: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for trial in range(1 + repeats):
        model.network(batch)
        times, counts = _by_operator(lambda: [merges.repeat(merge, layer) for layer in merges.steps], device)
        if trial > 0:
            totals += times
            calls += counts
    whole = sum(totals.values())
    return [
        {"operator": name, "calls": round(calls[name] / repeats), "share": time / whole}
        for name, time in totals.most_common()
    ]


@torch.inference_mode()
def profile_passes(
    model: Segmenter, method: str, options: Mapping[str, Any], batch: Tensor, device: torch.device, repeats: int = 10
) -> list[dict[str, Any]]:
    """Time of a pass without merging and of one with it by operator, interleaved.

    An operator whose time falls less than the operations of the model lowers the realized share.

    Args:
        model: unpatched.
        method, options: for `patch.apply`.
        batch: (B, 3, H, W), on the device.

    Returns:
        list of `operator`, `ms_pure` and `ms` per pass, the longest in the pure pass first. Both are 0 at least: an
        operator may run in one of them alone.
    """
    merged = patch.apply(copy.deepcopy(model), method, **options)
    totals: dict[str, Counter[str]] = {"pure": Counter(), "merged": Counter()}
    for trial in range(1 + repeats):
        for name, one in (("pure", model), ("merged", merged)):
            one.network(batch)
            times, _ = _by_operator(lambda one=one: one.network(batch), device)  # type: ignore[misc]
            totals[name] += times if trial > 0 else Counter()
    pure, own = ({name: time / repeats / 1e3 for name, time in found.items()} for found in totals.values())
    names = sorted({*pure, *own}, key=lambda name: -pure.get(name, 0.0))
    return [{"operator": name, "ms_pure": pure.get(name, 0.0), "ms": own.get(name, 0.0)} for name in names]


def _by_operator(call: Callable[[], Any], device: torch.device) -> tuple[Counter[str], Counter[str]]:
    """Time of one call in each operator itself, µs, and the number of calls of the operator."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities) as profiler, record_function(OUTSIDE):
        call()
    times: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[event.key] += event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        calls[event.key] += event.count if event.key != OUTSIDE else 0
    return times, calls
