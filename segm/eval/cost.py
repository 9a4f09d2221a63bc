"""What a model costs: operations and time per image."""

import statistics
import time
import warnings

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # fvcore imports parts of torch.jit that are on their way out
    from fvcore.nn import FlopCountAnalysis
    from fvcore.nn.jit_handles import get_shape


def count_gflops(model, images):
    """Operations of one forward pass in fvcore's convention, one per multiply-add, per image.

    Args:
        model: images (B, 3, H, W) -> anything; upsampling included if the model does it.
        images: its input; for a merging model the count depends on it.

    Returns:
        10⁹ operations per image.
    """
    with torch.inference_mode():
        analysis = FlopCountAnalysis(model, images)
        analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_operations)
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
        return analysis.total() / len(images) / 1e9


def _attention_operations(inputs, outputs):
    """fvcore's count of explicit attention: the two matrix products."""
    queries, keys, values = (get_shape(value) for value in inputs[:3])
    *batch, n_queries, width = queries
    pairs = n_queries * keys[-2]
    for size in batch:
        pairs *= size
    return pairs * (width + values[-1])


@torch.inference_mode()
def images_per_second(calls, batches, device, repeats=3, warmup=2):
    """Speed of several models, interleaved so that they meet the same conditions.

    Args:
        calls: name -> function of a batch (B, 3, H, W).
        batches: list of batches.
        repeats: passes over the batches.
        warmup: untimed calls of each function.

    Returns:
        name -> median over all batches and passes.
    """
    for call in calls.values():
        for _ in range(warmup):
            call(batches[0])
    rates = {name: [] for name in calls}
    for _ in range(repeats):
        for batch in batches:
            for name, call in calls.items():
                start = _now(device)
                call(batch)
                rates[name].append(len(batch) / (_now(device) - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def _now(device):
    """Seconds, once the device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
