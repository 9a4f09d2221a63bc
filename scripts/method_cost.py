"""Costs and savings of one method in one model, part by part: the merges alone, the matrix products alone, memory."""

import copy
import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matrix_products import products_alone
from torch import Tensor

import patch
from patch.trials import interleaved_trials, ratio, realized_share, share_of_time, speed
from segm.eval.cost import Cost
from segm.eval.timing import warm_up_shapes
from segm.merging import compile_network
from segm.model.linear import restore_linear
from segm.model.segmenter import Segmenter
from segm.model.upsample import upsample

PAIR_REPEATS = 4
DRAWS = 2000  # of the bootstrap
CONFIDENCE = 0.95

Call = Callable[[Tensor], Any]


@torch.inference_mode()
def measure(
    model: Segmenter,
    method: str,
    options: Mapping[str, Any],
    batches: Sequence[Tensor],
    device: torch.device,
    repeats: int,
    compiled: bool = False,
) -> dict[str, Any]:
    """Costs and savings of one method in one model, in every part.

    Args:
        model: unpatched.
        method, options: for `patch.apply`.
        batches: images (B, 3, H, W), on the device.
        repeats: timed passes per batch.
        compiled: also compile the model, without merging and with it, and time its token scores.

    Returns:
        dict: `tokens`, `n_patches`, `gflops_pure`, `gflops` (encoder and decoder); images/s of token scores
        (`scores_pure`, `scores`) and of label maps (`predict_eager`, `predict_pure`, `predict`); `ratio` and `share` of
        both, with `share_scores_low` and `_high` (`ratio_interval`), and `share_products`, of the matrix products of a
        pass alone; `upsampling_*_ms`; `overhead` of the merges alone by layer, `overhead_undo` and
        `overhead_difference`, as shares of the pure pass; peak memory above the models, MiB. With `compiled` also
        `scores_compiled_pure`, `scores_compiled`, and their ratios to the pure model as it is, `ratio_compiled_pure`
        and `ratio_compiled`.
    """
    with torch.inference_mode(False):  # for `products_alone`: an inference tensor does not know whose view it is
        merged = patch.apply(copy.deepcopy(model), method, **options)
    recorded = {batch.data_ptr(): Merges.record(merged, batch) for batch in batches}
    pair = {"scores_pure": model.network, "scores": merged.network}
    labels = {
        "predict_eager": eager_label_map(model),
        "predict_pure": model.predict,
        "predict": merged.predict,
        "upsampling_pure": _upsampling_call(model, batches),
        "upsampling": _upsampling_call(merged, batches),
    }
    with with_free_merges(merged, recorded) as free:
        parts = {"scores_free": free, **_merge_calls(merged, recorded)}
        parts |= _compiled_calls(model, merged, batches) if compiled else {}
        # Apart: all scores upsampled at once leave memory in a state that slows down the next calls.
        trials = interleaved_trials(pair | parts, batches, device, repeats=repeats)
    extra = _overhead(trials, patch.options(merged)["layers"])
    for name in ("compiled_pure", "compiled") if compiled else ():
        extra[f"ratio_{name}"] = ratio(trials[f"scores_{name}"], trials["scores_pure"])
    # The two that the targets are about once more, next to each other and with more repeats.
    paired = pair | {"products_pure": _products(model, batches), "products": _products(merged, batches)}
    trials |= interleaved_trials(paired, batches, device, repeats=PAIR_REPEATS * repeats, warm=True)
    trials |= interleaved_trials(labels, batches, device, repeats=repeats, warm=True)
    pure, own = Cost.of(model, batches), Cost.of(merged, batches)
    row = {"tokens": own.tokens, "n_patches": pure.counts[0], "settings": patch.options(merged)}
    row |= {"gflops_pure": pure.network, "gflops": own.network}
    row |= {name: speed(trials[name]) for name in trials if name.split("_")[0] in ("scores", "predict")}
    row |= _ratios(trials, pure, own) | extra
    calls = pair | {name: labels[name] for name in ("predict_pure", "predict")}
    return row | {f"memory_{name}_mib": peak_memory(call, batches[0], device) for name, call in calls.items()}


def _products(model: Segmenter, batches: Sequence[Tensor]) -> Call:
    """The matrix products of token scores by themselves, as a function of a batch."""
    repeated = {batch.data_ptr(): products_alone(model.network, batch) for batch in batches}
    return lambda batch: repeated[batch.data_ptr()]()


def _compiled_calls(model: Segmenter, merged: Segmenter, batches: Sequence[Tensor]) -> dict[str, Call]:
    """Token scores of compiled copies, warmed up on the batches."""
    copies = {"scores_compiled_pure": model, "scores_compiled": merged}
    calls: dict[str, Call] = {name: compile_network(copy.deepcopy(one)) for name, one in copies.items()}
    warm_up_shapes(calls, batches)
    return calls


def _upsampling_call(model: Segmenter, batches: Sequence[Tensor]) -> Call:
    """The last part of `predict`, from the network's result to the label map, as a function of a batch."""
    found = {batch.data_ptr(): model.network(batch) for batch in batches}
    return lambda batch: model.to_labels(found[batch.data_ptr()], batch.shape[-2:])


def eager_label_map(model: Segmenter) -> Call:
    """Label map as one would write it today: PyTorch's layers, all scores upsampled in float32, then the argmax."""
    plain = restore_linear(copy.deepcopy(model))

    def predict(images: Tensor) -> Tensor:
        scores = plain.grid_logits(images).float().contiguous()
        has_all_pixels = scores.shape[-2:] == images.shape[-2:]  # from masks
        return (scores if has_all_pixels else upsample(scores, images.shape[-2:])).argmax(1)

    return predict


# ---------------------------------------------------------------------------------------------- the merges alone


@dataclass(frozen=True)
class Merges:
    """Inputs and results of every merge of one pass.

    Attributes:
        steps: 1-based layer -> (`patch.Step`, its `Reduction`).
    """

    steps: dict[int, tuple[patch.Step, patch.Reduction]]

    @classmethod
    def record(cls, model: Segmenter, images: Tensor) -> "Merges":
        """Of one pass of a patched model over images (B, 3, H, W)."""
        merge, steps = patch.find(patch.method(model)).merge, {}

        def noted(step: patch.Step) -> patch.Reduction | None:
            steps[step.layer] = step, merge(step)
            return steps[step.layer][1]

        with patch.replaced_merge(model, noted):
            model.network(images)
        return cls(steps)

    def repeat(self, merge: Callable[[patch.Step], patch.Reduction], layer: int) -> Tensor:
        """One merge by itself: choosing tokens and merging them."""
        step, _ = self.steps[layer]
        return merge(step).merge(step.x)

    @property
    def total(self) -> patch.Reduction:
        """All merges seen as one."""
        first, *others = (reduction for _, reduction in self.steps.values())
        for other in others:
            first = first.then(other)
        return first


@contextmanager
def with_free_merges(model: Segmenter, recorded: Mapping[int, Merges]) -> Iterator[Call]:
    """While open, gives token scores of a copy of a patched model that gets its reductions for free.

    Args:
        model: patched.
        recorded: address of a batch -> `Merges`.
    """
    twin, current = copy.deepcopy(model), {}

    def network(images: Tensor) -> Tensor:
        current["steps"] = recorded[images.data_ptr()].steps
        return twin.network(images)

    with patch.replaced_merge(twin, lambda step: current["steps"][step.layer][1]):
        yield network


def _merge_calls(merged: Segmenter, recorded: Mapping[int, Merges]) -> dict[str, Call]:
    """The merge of every layer by itself, and undoing all of them, as functions of a batch."""
    method = patch.find(patch.method(merged))
    undo = patch.options(merged).get("restore_at", method.undo)
    of_logits = undo == "decoder" and not (merged.on_grid or merged.has_queries)
    merge, width = method.merge, merged.n_cls if of_logits else merged.encoder.embed_dim
    layers = next(iter(recorded.values())).steps
    calls: dict[str, Call] = {f"merge_{layer}": _repeated(recorded, merge, layer) for layer in layers}
    totals = {address: merges.total for address, merges in recorded.items()}
    scores = {
        address: torch.randn(*total.sizes.shape, width, device=total.sizes.device) for address, total in totals.items()
    }
    calls["undo"] = lambda batch: totals[batch.data_ptr()].unmerge(scores[batch.data_ptr()])
    return calls


def _repeated(recorded: Mapping[int, Merges], merge: Callable[[patch.Step], patch.Reduction], layer: int) -> Call:
    """The merge of one layer, as a function of a batch."""
    return lambda batch: recorded[batch.data_ptr()].repeat(merge, layer)


def _overhead(trials: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Any]:
    """Time of the merges, as shares of the pure pass."""
    shares = {name: share_of_time(trials["scores_pure"], rates) for name, rates in trials.items()}
    return {
        "overhead": {layer: shares[f"merge_{layer}"] for layer in layers},
        "overhead_undo": shares["undo"],
        "overhead_difference": shares["scores"] - shares["scores_free"],
    }


# ---------------------------------------------------------------------------------------------- ratios and memory


def _ratios(trials: Mapping[str, Tensor], pure: Cost, own: Cost) -> dict[str, float]:
    """Speed against the pure model, its share of the saved operations, and milliseconds of upsampling per image."""
    found = {"saving": pure.network / own.network}
    for name in ("scores", "predict"):
        mine, other = trials[name], trials[f"{name}_pure"]
        found[f"ratio_{name}"] = ratio(mine, other)
        found[f"share_{name}"] = realized_share(mine, other, own.network, pure.network)
    found["share_scores_low"], found["share_scores_high"] = (
        bound / found["saving"] for bound in ratio_interval(trials["scores"], trials["scores_pure"])
    )
    products = trials["products"], trials["products_pure"]
    found["share_products"] = realized_share(*products, own.network, pure.network)
    for name in ("_pure", ""):
        found[f"upsampling{name}_ms"] = 1000 / speed(trials[f"upsampling{name}"])
    found["ratio_predict_eager"] = ratio(trials["predict"], trials["predict_eager"])
    found["ratio_pure_eager"] = ratio(trials["predict_pure"], trials["predict_eager"])
    return found


def ratio_interval(trials: Tensor, others: Tensor) -> tuple[float, float]:
    """Bounds that hold `ratio` with a confidence of 95 %, by drawing these trials anew (bootstrap).

    They leave out all that a whole run has in common, such as the place of the weights in memory.

    Args:
        trials, others: (batches, trials), images/s.
    """
    quotients = others / trials
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(quotients.shape[1], (DRAWS, *quotients.shape), generator=generator)
    shares = quotients.expand(DRAWS, -1, -1).gather(2, drawn).quantile(0.5, dim=2).mean(1)
    outside = (1 - CONFIDENCE) / 2
    return 1 / shares.quantile(1 - outside).item(), 1 / shares.quantile(outside).item()


def peak_memory(call: Call, batch: Tensor, device: torch.device) -> float | None:
    """Peak memory of a call above the memory in use before it, MiB; on the CPU from Linux, None elsewhere."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call(batch)
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    clear, status = Path("/proc/self/clear_refs"), Path("/proc/self/status")
    if not clear.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # returns freed memory, so that the peak shows it again
    before = _status(status, "VmRSS")
    clear.write_text("5")  # the peak starts anew
    call(batch)
    return (_status(status, "VmHWM") - before) / 1024


def _status(file: Path, key: str) -> int:
    """A number of KiB out of /proc/self/status."""
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(key))
