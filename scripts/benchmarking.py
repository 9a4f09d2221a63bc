"""The measurements of `scripts/benchmark.py`: one model with and without merging, in one run."""

import copy
import ctypes
import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

import patch
from segm.eval.operations import count_operations
from segm.eval.timing import interleaved_rates
from segm.model.factory import create_segmenter
from segm.model.upsample import label_map, upsample
from segm.speedtest import meet_every_shape
from segm.token_stats import count_tokens

BACKBONES = {
    name: f"vit_{size}_patch16_384" for name, size in zip("TSBL", ("tiny", "small", "base", "large"), strict=True)
}
BISECTIONS = 25
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
    rates = interleaved_rates(pair | parts, batches, device, repeats=repeats)
    beside = _overhead(rates, merged)
    for name in ("compiled_pure", "compiled") if compiled else ():
        beside[f"ratio_{name}"] = (rates[f"scores_{name}"] / rates["scores_pure"]).median().item()
    # The two that the targets are about once more, next to each other and more often.
    rates |= interleaved_rates(pair, batches, device, repeats=PAIR_REPEATS * repeats)
    rates |= interleaved_rates(labels, batches, device, repeats=repeats)
    calls = pair | parts | labels
    row = {
        "tokens": tokens,
        "n_patches": count_tokens(model, batches[0][:1]).item(),
        "settings": patch.settings(merged),
    }
    row |= _operations(model, merged, batches)
    row |= {name: rates[name].median().item() for name in calls if name.split("_")[0] in ("scores", "predict")}
    row |= _ratios(rates, row)
    row |= beside
    memory = {
        name: peak_memory(calls[name], batches[0], device)
        for name in ("scores_pure", "scores", "predict_pure", "predict")
    }
    return row | {f"memory_{name}_mib": value for name, value in memory.items()}


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
    ratios = {name: (rates[name] / rates[f"{name}_pure"]).median().item() for name in ("scores", "predict")}
    found = {f"ratio_{name}": ratio for name, ratio in ratios.items()} | {"saving": saving}
    found |= {f"share_{name}": ratio / saving for name, ratio in ratios.items()}
    for name in ("_pure", ""):
        found[f"upsampling{name}_ms"] = (1000 / rates[f"upsampling{name}"]).median().item()
    found["ratio_predict_eager"] = (rates["predict"] / rates["predict_eager"]).median().item()
    found["ratio_pure_eager"] = (rates["predict_pure"] / rates["predict_eager"]).median().item()
    return found


def _overhead(rates, merged):
    """Time of the merges, as shares of the pure pass."""
    pure = rates["scores_pure"]
    alone = {layer: (pure / rates[f"merge_{layer}"]).median().item() for layer in merged.merging.settings["layers"]}
    undo = (pure / rates["undo"]).median().item()
    difference = (pure / rates["scores"] - pure / rates["scores_free"]).median().item()
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
