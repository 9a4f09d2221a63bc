"""The measurements of `scripts/benchmark.py`: one model with and without merging, in one run."""

import copy
import ctypes
import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

import patch
from segm.eval.operations import count_operations
from segm.eval.timing import interleaved_turns
from segm.model.factory import create_segmenter
from segm.model.upsample import label_map, upsample
from segm.speedtest import meet_every_shape
from segm.token_stats import count_tokens

BACKBONES = {
    name: f"vit_{size}_patch16_384" for name, size in zip("TSBL", ("tiny", "small", "base", "large"), strict=True)
}
BISECTIONS = 25
MERGES = "merges"
PAIR_REPEATS = 4


def build_model(name, side, n_cls, device, dtype):
    """A Segmenter with random weights; name: T, S, B or L; side: pixels; dtype None: float32."""
    torch.manual_seed(0)
    net = {"backbone": BACKBONES[name], "image_size": side, "n_cls": n_cls, "decoder": {"name": "mask_transformer"}}
    return create_segmenter(net).eval().to(device=device, dtype=dtype)


@torch.inference_mode()
def settings_for(model, method, batches, tokens, layers=None):
    """Options with which a method keeps about so many tokens of some batches (B, 3, H, W), on average.

    A method with a threshold is bisected in the layers up to its last merge; one with r takes what leaves so many
    after all layers; any other is taken as it is. layers: 1-based; None: those of the method.
    """
    defaults, depth = patch.METHODS[method].defaults, len(model.encoder.blocks)
    n_patches = count_tokens(model, batches[0][:1]).item()
    if "r" in defaults:
        return {"r": -(-(n_patches - tokens) // depth)}
    if "threshold" not in defaults:
        return {}
    layers = patch.check(method, depth, model.encoder.patch_embed.grid_size, layers=layers)["layers"]
    short = copy.deepcopy(model)
    del short.encoder.blocks[layers[-1] :]
    patch.segmenter(short, method, layers=list(layers), threshold=1.0)
    low, high = -1.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        patch.set_threshold(short, middle)
        kept = sum(_kept(short, batch) for batch in batches) / len(batches)
        low, high = (low, middle) if kept > tokens else (middle, high)
    return {"layers": list(layers), "threshold": high}


def _kept(model, images):
    """Mean number of tokens after the last merge."""
    model.encoder.forward_features(images)
    return patch.reduction(model).counts.double().mean().item()


@dataclass
class Merges:
    """What every merge of one pass was given and did.

    Attributes:
        steps: 1-based layer -> (`patch.Step`, its `Reduction`).
    """

    steps: dict

    @classmethod
    def record(cls, model, images):
        """Of one pass of a patched model over images (B, 3, H, W)."""
        merging, steps = model.merging, {}
        method = merging.method

        def merge(step):
            steps[step.layer] = step, method.merge(step)
            return steps[step.layer][1]

        merging.method = dataclasses.replace(method, merge=merge)
        model.grid_scores(images)
        merging.method = method
        return cls(steps)

    def repeat(self, merge, layer):
        """One merge by itself: choosing tokens and merging them."""
        step, _ = self.steps[layer]
        return merge(step).merge(step.x)


def replaying(model, recorded):
    """A patched model that gets its reductions for free.

    Args:
        model: patched; a copy with the same weights is returned.
        recorded: address of a batch -> `Merges`.
    """
    twin = copy.deepcopy(model)
    method, current = twin.merging.method, {}
    twin.merging.method = dataclasses.replace(method, merge=lambda step: current["merges"].steps[step.layer][1])

    def grid_scores(images):
        current["merges"] = recorded[images.data_ptr()]
        return twin.grid_scores(images)

    return grid_scores


def eager_label_map(model):
    """Label map as one would write it today: all scores upsampled in float32, then the argmax."""

    def predict(images):
        scores = model.grid_scores(images).float().contiguous()
        return upsample(scores, images.shape[-2:]).argmax(1)

    return predict


@torch.inference_mode()
def measure(model, method, options, batches, device, repeats, compiled=False):
    """One row of the benchmark.

    Args:
        model: an unpatched Segmenter.
        method, options: for `patch.segmenter`.
        batches: list of images (B, 3, H, W), on the device.
        repeats: timed passes per batch.
        compiled: also compile the model, without merging and with it, and time its token scores.

    Returns:
        dict: `tokens`, `n_patches`, `gflops_pure`, `gflops`; images/s of token scores (`scores_pure`, `scores`) and of
        label maps (`predict_eager`, `predict_pure`, `predict`); `ratio` and `share` of both; `upsampling_*_ms`;
        `overhead` of the merges alone by layer, `overhead_undo` and `overhead_difference`, as shares of the pure pass;
        peak memory above the models, MiB. With `compiled` also `scores_compiled_pure`, `scores_compiled`, and their
        ratios to the pure model as it is, `ratio_compiled_pure` and `ratio_compiled`.
    """
    merged = patch.segmenter(copy.deepcopy(model), method, **options)
    recorded = {batch.data_ptr(): Merges.record(merged, batch) for batch in batches}
    tokens = torch.cat([count_tokens(merged, batch) for batch in batches]).double().mean().item()
    pair = {"scores_pure": model.grid_scores, "scores": merged.grid_scores}
    parts = {
        "scores_free": replaying(merged, recorded),
        **_merge_calls(merged, recorded),
        **(_compiled_calls(model, merged, batches) if compiled else {}),
    }
    labels = {
        "predict_eager": eager_label_map(model),
        "predict_pure": model.predict,
        "predict": merged.predict,
        "upsampling_pure": _upsampling_call(model, batches),
        "upsampling": _upsampling_call(merged, batches),
    }
    # Apart: all scores upsampled at once leave memory in a state that slows down what comes next.
    rates = interleaved_turns(pair | parts, batches, device, repeats=repeats)
    beside = _overhead(rates, merged)
    for name in ("compiled_pure", "compiled") if compiled else ():
        beside[f"ratio_{name}"] = ratio(rates[f"scores_{name}"], rates["scores_pure"])
    # The two that the targets are about once more, next to each other and more often.
    rates |= interleaved_turns(pair, batches, device, repeats=PAIR_REPEATS * repeats)
    rates |= interleaved_turns(labels, batches, device, repeats=repeats)
    calls = pair | parts | labels
    row = {
        "tokens": tokens,
        "n_patches": count_tokens(model, batches[0][:1]).item(),
        "settings": patch.settings(merged),
    }
    row |= _operations(model, merged, batches)
    row |= {name: speed(rates[name]) for name in calls if name.split("_")[0] in ("scores", "predict")}
    row |= _ratios(rates, row)
    row |= beside
    memory = {
        name: peak_memory(calls[name], batches[0], device)
        for name in ("scores_pure", "scores", "predict_pure", "predict")
    }
    return row | {f"memory_{name}_mib": value for name, value in memory.items()}


@torch.inference_mode()
def profile_merges(model, method, options, batch, device, repeats=20):
    """What the merges of one pass spend their time in, by operator; a plain pass before each keeps caches as they are.

    Args:
        model: an unpatched Segmenter.
        method, options: for `patch.segmenter`.
        batch: (B, 3, H, W), on the device.

    Returns:
        list of `operator`, `calls` per pass and `share` of the time that the profiler saw, the longest first; what is
        no operator of PyTorch's (Python, NumPy, OpenCV) is the rest of the time, called "outside".
    """
    merged = patch.segmenter(copy.deepcopy(model), method, **options)
    merges, merge = Merges.record(merged, batch), merged.merging.method.merge
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    totals, calls = Counter(), Counter()
    for turn in range(1 + repeats):
        model.grid_scores(batch)
        with profile(activities=activities) as profiler, record_function(MERGES):
            for layer in merges.steps:
                merges.repeat(merge, layer)
        if turn == 0:
            continue
        for event in profiler.key_averages():
            time = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
            totals[event.key] += time
            calls[event.key] += event.count
    totals["outside"], calls["outside"] = totals.pop(MERGES, 0), 0
    whole = sum(totals.values())
    return [
        {"operator": name, "calls": round(calls[name] / repeats), "share": time / whole}
        for name, time in totals.most_common()
    ]


def speed(rates):
    """Images/s over all batches, each at the median of its turns; rates: (batches, turns), images/s."""
    return 1 / (1 / rates.quantile(0.5, dim=1)).mean().item()


def ratio(rates, others):
    """Speed over all batches against another's, which takes the same time for each: of every batch the median over its
    turns, in which both ran one after the other, so that a machine whose speed drifts changes little.

    Args:
        rates, others: (batches, turns), images/s.
    """
    return 1 / share_of_time(others, rates)


def share_of_time(others, rates):
    """Time per pass as a share of another's, mean over the batches; arguments as for `ratio`, the other first."""
    return (others / rates).quantile(0.5, dim=1).mean().item()


def _compiled_calls(model, merged, batches):
    """Token scores of compiled copies, which have met the batches."""
    copies = {"scores_compiled_pure": model, "scores_compiled": merged}
    calls = {name: patch.compile(copy.deepcopy(one)).grid_scores for name, one in copies.items()}
    meet_every_shape(calls, batches)
    return calls


def _merge_calls(merged, recorded):
    """The merge of every layer by itself, and undoing all of them, as functions of a batch."""
    merge = merged.merging.method.merge
    layers = next(iter(recorded.values())).steps
    calls = {
        f"merge_{layer}": lambda batch, layer=layer: recorded[batch.data_ptr()].repeat(merge, layer) for layer in layers
    }
    totals, scores = {}, {}
    for address, merges in recorded.items():
        for _, reduction in merges.steps.values():
            totals[address] = totals[address].then(reduction) if address in totals else reduction
        total = totals[address]
        scores[address] = torch.randn(*total.sizes.shape, merged.n_cls, device=total.sizes.device)
    calls["undo"] = lambda batch: totals[batch.data_ptr()].unmerge(scores[batch.data_ptr()])
    return calls


def _upsampling_call(model, batches):
    """From the scores of the patches to the label map, the last part of `predict`, as a function of a batch."""
    scores = {batch.data_ptr(): model.grid_scores(batch) for batch in batches}
    return lambda batch: label_map(scores[batch.data_ptr()], model.patch_size)


def _operations(model, merged, batches):
    """10⁹ operations per image of encoder and decoder, mean over the batches."""
    found = {}
    for name, counted in (("gflops_pure", model), ("gflops", merged)):
        counts = [count_operations(counted, batch) for batch in (batches[:1] if counted is model else batches)]
        found[name] = sum(count.encoder + count.decoder for count in counts) / len(counts)
    return found


def _ratios(rates, row):
    """Speed against the pure model, its share of the saved operations, and milliseconds of upsampling per image."""
    saving = row["gflops_pure"] / row["gflops"]
    ratios = {name: ratio(rates[name], rates[f"{name}_pure"]) for name in ("scores", "predict")}
    found = {f"ratio_{name}": value for name, value in ratios.items()} | {"saving": saving}
    found |= {f"share_{name}": value / saving for name, value in ratios.items()}
    for name in ("_pure", ""):
        found[f"upsampling{name}_ms"] = 1000 / speed(rates[f"upsampling{name}"])
    found["ratio_predict_eager"] = ratio(rates["predict"], rates["predict_eager"])
    found["ratio_pure_eager"] = ratio(rates["predict_pure"], rates["predict_eager"])
    return found


def _overhead(rates, merged):
    """Time of the merges, as shares of the pure pass."""
    pure = rates["scores_pure"]
    layers = merged.merging.settings["layers"]
    alone = {layer: share_of_time(pure, rates[f"merge_{layer}"]) for layer in layers}
    undo = share_of_time(pure, rates["undo"])
    difference = share_of_time(pure, rates["scores"]) - share_of_time(pure, rates["scores_free"])
    return {"overhead": alone, "overhead_undo": undo, "overhead_difference": difference}


def peak_memory(call, batch, device):
    """MiB that a call holds at most above what was there before; on the CPU from Linux, None elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(batch)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that the peak shows it again
    before = _status(status, "VmRSS")
    clear.write_text("5")  # the peak starts anew
    call(batch)
    return (_status(status, "VmHWM") - before) / 1024


def _status(file, key):
    """A number of KiB out of /proc/self/status."""
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(key))
