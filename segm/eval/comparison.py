"""What merging saves and costs: tokens, operations, speed and memory of models that are compared inside one run.

Every speed comes from `segm.eval.timing.interleaved_turns`, on the same batches. "Turns" below are its rates, (batches,
turns) in images/s.
"""

import copy
import ctypes
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import patch
from segm.eval.operations import count_operations
from segm.eval.products import products_alone
from segm.eval.timing import interleaved_turns
from segm.merging import compile_network
from segm.model.linear import restore_linear
from segm.model.segmenter import Segmenter
from segm.model.upsample import upsample

BISECTIONS = 25
PAIR_REPEATS = 4
DRAWS = 2000  # of the bootstrap
CONFIDENCE = 0.95
COMPILING_PASSES = 3  # of every shape: compile, record a CUDA graph, replay it

Call = Callable[[Tensor], Any]


# ---------------------------------------------------------------------------------------------- tokens and operations


@torch.inference_mode()
def count_tokens(model: Segmenter, images: Tensor) -> Tensor:
    """Patch tokens that are left at the end of the encoder.

    Args:
        model: patched or not.
        images: (B, 3, H, W).

    Returns:
        (B,), int64, on the CPU.
    """
    model.network(images)
    reduction = patch.reduction(model) if patch.is_patched(model) else None
    if reduction is not None:
        return reduction.counts.cpu()
    return torch.full((len(images),), math.prod(model.grid(images.shape[-2:])))


def mean_tokens(model: Segmenter, batches: Sequence[Tensor]) -> float:
    """Patch tokens that an image keeps, on average."""
    return torch.cat([count_tokens(model, batch) for batch in batches]).double().mean().item()


@dataclass(frozen=True)
class Cost:
    """What a model computes, mean over batches; operations are 10⁹ per image, one per multiply-add.

    Attributes:
        total: all operations, upsampling included.
        encoder, decoder: those of the two parts.
        counts: patch tokens that each image keeps.
    """

    total: float
    encoder: float
    decoder: float
    counts: tuple[int, ...]

    @classmethod
    def of(cls, model: Segmenter, batches: Sequence[Tensor]) -> "Cost":
        """Count; without merging all batches of one shape cost the same, and only the first is looked at."""
        seen = batches if patch.is_patched(model) else [batches[0]]
        found = [count_operations(model, batch) for batch in seen]
        total, encoder, decoder = (
            sum(getattr(one, part) for one in found) / len(found) for part in ("total", "encoder", "decoder")
        )
        counts = torch.cat([count_tokens(model, batch) for batch in seen]).tolist()
        return cls(
            total, encoder, decoder, tuple(counts if patch.is_patched(model) else counts[:1] * sum(map(len, batches)))
        )

    @property
    def network(self) -> float:
        """Operations of encoder and decoder."""
        return self.encoder + self.decoder

    @property
    def tokens(self) -> float:
        """Mean of the counts."""
        return sum(self.counts) / len(self.counts)


@torch.inference_mode()
def settings_for(
    model: Segmenter,
    method: str,
    batches: Sequence[Tensor],
    tokens: int,
    layers: Sequence[int] | None = None,
    *,
    budget: bool = False,
) -> dict[str, Any]:
    """Options with which a method keeps about so many tokens of some batches (B, 3, H, W), on average.

    A method with r takes what leaves so many after all its layers; one with a threshold is bisected in the layers up to
    its last merge; one that has a budget of tokens alone gets that; any other is taken as it is.

    Args:
        model: unpatched.
        layers: 1-based; None: those of the method.
        budget: give the exact budget also to methods that have r or a threshold.
    """
    entry, depth = patch.find(method), len(model.encoder.blocks)
    chosen = {} if layers is None else {"layers": list(layers)}
    if entry.takes("tokens") and (budget or not (entry.takes("r") or entry.takes("threshold"))):
        return chosen | {"tokens": tokens}
    layers = patch.check(method, depth, model.encoder.patch_embed.grid_size, **chosen)["layers"]
    if entry.takes("r"):
        n_patches = count_tokens(model, batches[0][:1]).item()
        return chosen | {"r": -(-(n_patches - tokens) // len(layers))}
    if entry.takes("threshold"):
        return {"layers": list(layers), "threshold": _bisect(model, method, batches, tokens, layers)}
    return chosen


def _bisect(model: Segmenter, method: str, batches: Sequence[Tensor], tokens: int, layers: Sequence[int]) -> float:
    """Lowest threshold that keeps at least so many tokens, to 2⁻²⁴."""
    short = copy.deepcopy(model)
    if not model.has_queries:  # queries join at a distance from the end
        del short.encoder.blocks[layers[-1] :]
    patch.apply(short, method, layers=list(layers), threshold=1.0)
    low, high = -1.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        patch.set_threshold(short, middle)
        kept = sum(_kept(short, batch) for batch in batches) / len(batches)
        low, high = (low, middle) if kept > tokens else (middle, high)
    return high


def _kept(model: Segmenter, images: Tensor) -> float:
    """Mean number of tokens after the last merge."""
    model.encoder.forward_features(images)
    reduction = patch.reduction(model)
    assert reduction is not None  # a pass has just run
    return reduction.counts.double().mean().item()


# ---------------------------------------------------------------------------------------------- speed


def speed(turns: Tensor) -> float:
    """Images/s over all batches, each at the median of its turns."""
    return 1 / (1 / turns.quantile(0.5, dim=1)).mean().item()


def share_of_time(others: Tensor, turns: Tensor) -> float:
    """Time per pass as a share of another's: of every batch the median over neighboring turns, in which both ran one
    after the other, so that a machine whose speed drifts changes little; then the mean over the batches.

    Args:
        others, turns: (batches, turns), images/s.
    """
    return (others / turns).quantile(0.5, dim=1).mean().item()


def ratio(turns: Tensor, others: Tensor) -> float:
    """Speed over all batches against another's, which takes the same time for each; as in `share_of_time`."""
    return 1 / share_of_time(others, turns)


def ratio_interval(turns: Tensor, others: Tensor) -> tuple[float, float]:
    """Between which values `ratio` lies with 95 %, as far as these turns can tell: they are drawn anew (bootstrap).

    What a whole run has in common, as the place of the weights in memory, is not in it.

    Args:
        turns, others: (batches, turns), images/s.
    """
    quotients = others / turns
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(quotients.shape[1], (DRAWS, *quotients.shape), generator=generator)
    shares = quotients.expand(DRAWS, -1, -1).gather(2, drawn).quantile(0.5, dim=2).mean(1)
    outside = (1 - CONFIDENCE) / 2
    return 1 / shares.quantile(1 - outside).item(), 1 / shares.quantile(outside).item()


def realised_share(turns: Tensor, pure_turns: Tensor, operations: float, pure_operations: float) -> float:
    """(speed merged ÷ speed pure) ÷ (operations pure ÷ operations merged); 1: all saved operations are saved time."""
    return ratio(turns, pure_turns) / (pure_operations / operations)


@torch.inference_mode()
def meet_every_shape(calls: Mapping[str, Call], batches: Sequence[Tensor]) -> None:
    """Let compiled models see every number of tokens before they are timed.

    Args:
        calls: name -> function of a batch (B, 3, H, W).
        batches: those that will be timed.
    """
    for batch in tqdm(batches, desc="compiling", unit="batch", leave=False):
        for call in calls.values():
            for _ in range(COMPILING_PASSES):
                call(batch)


def compare(
    models: Mapping[str, Segmenter],
    references: Mapping[str, str],
    batches: Mapping[str, Sequence[Tensor]],
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Speed and cost of models on images, one batch at a time, all interleaved.

    Args:
        models: name -> model, unpatched references included.
        references: name -> name of the unpatched model that it is compared with, for the models that are asked for.
        batches: name -> the batches that it is fed; a model and its reference share theirs.
        device: where models and batches are.

    Returns:
        name -> dict: `tokens` (mean) of `n_patches`, `counts` (of every image); `gflops`, `gflops_encoder`,
        `gflops_decoder`; `images_per_second` of `predict`, `images_per_second_scores` of token scores;
        `realised_share` of `reference`.
    """

    def on_batch(function: Call, name: str) -> Callable[[list[int]], Any]:
        return lambda index: function(batches[name][index[0]])  # `interleaved_turns` passes the number of a batch

    calls = {(name, "labels"): on_batch(models[name].predict, name) for name in references}
    calls |= {(name, "scores"): on_batch(model.network, name) for name, model in models.items()}
    n_batches = min(len(batches[name]) for name in models)
    turns = interleaved_turns(calls, [[index] for index in range(n_batches)], device, settled=True, progress=True)
    costs = {
        name: Cost.of(model, batches[name])
        for name, model in tqdm(models.items(), desc="operations", unit="run", leave=False)
    }
    rows = {}
    for name, reference in references.items():
        own, pure, size = costs[name], costs[reference], len(batches[name][0])
        scores, pure_scores = turns[name, "scores"], turns[reference, "scores"]
        rows[name] = {
            "tokens": own.tokens,
            "n_patches": pure.counts[0],
            "gflops": own.total,
            "gflops_encoder": own.encoder,
            "gflops_decoder": own.decoder,
            "images_per_second": size * speed(turns[name, "labels"]),
            "images_per_second_scores": size * speed(scores),
            "realised_share": realised_share(scores, pure_scores, own.network, pure.network),
            "reference": reference,
            "counts": list(own.counts),
        }
    return rows


# ---------------------------------------------------------------------------------------------- the merge by itself


@dataclass(frozen=True)
class Merges:
    """What every merge of one pass was given and did.

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
def replaying(model: Segmenter, recorded: Mapping[int, Merges]) -> Iterator[Call]:
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


def eager_label_map(model: Segmenter) -> Call:
    """Label map as one would write it today: PyTorch's layers, all scores upsampled in float32, then the argmax."""
    plain = restore_linear(copy.deepcopy(model))

    def predict(images: Tensor) -> Tensor:
        scores = plain.grid_logits(images).float().contiguous()
        has_all_pixels = scores.shape[-2:] == images.shape[-2:]  # from masks
        return (scores if has_all_pixels else upsample(scores, images.shape[-2:])).argmax(1)

    return predict


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
    """What one method costs and saves in one model, in every part.

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
    with replaying(merged, recorded) as free:
        parts = {"scores_free": free, **_merge_calls(merged, recorded)}
        parts |= _compiled_calls(model, merged, batches) if compiled else {}
        # Apart: all scores upsampled at once leave memory in a state that slows down what comes next.
        turns = interleaved_turns(pair | parts, batches, device, repeats=repeats)
    beside = _overhead(turns, patch.options(merged)["layers"])
    for name in ("compiled_pure", "compiled") if compiled else ():
        beside[f"ratio_{name}"] = ratio(turns[f"scores_{name}"], turns["scores_pure"])
    # The two that the targets are about once more, next to each other and more often.
    often = pair | {"products_pure": _products(model, batches), "products": _products(merged, batches)}
    turns |= interleaved_turns(often, batches, device, repeats=PAIR_REPEATS * repeats, settled=True)
    turns |= interleaved_turns(labels, batches, device, repeats=repeats, settled=True)
    pure, own = Cost.of(model, batches), Cost.of(merged, batches)
    row = {"tokens": own.tokens, "n_patches": pure.counts[0], "settings": patch.options(merged)}
    row |= {"gflops_pure": pure.network, "gflops": own.network}
    row |= {name: speed(turns[name]) for name in turns if name.split("_")[0] in ("scores", "predict")}
    row |= _ratios(turns, pure, own) | beside
    calls = pair | {name: labels[name] for name in ("predict_pure", "predict")}
    return row | {f"memory_{name}_mib": peak_memory(call, batches[0], device) for name, call in calls.items()}


def _products(model: Segmenter, batches: Sequence[Tensor]) -> Call:
    """The matrix products of token scores by themselves, as a function of a batch."""
    repeated = {batch.data_ptr(): products_alone(model.network, batch) for batch in batches}
    return lambda batch: repeated[batch.data_ptr()]()


def _compiled_calls(model: Segmenter, merged: Segmenter, batches: Sequence[Tensor]) -> dict[str, Call]:
    """Token scores of compiled copies, which have met the batches."""
    copies = {"scores_compiled_pure": model, "scores_compiled": merged}
    calls: dict[str, Call] = {name: compile_network(copy.deepcopy(one)) for name, one in copies.items()}
    meet_every_shape(calls, batches)
    return calls


def _merge_calls(merged: Segmenter, recorded: Mapping[int, Merges]) -> dict[str, Call]:
    """The merge of every layer by itself, and undoing all of them, as functions of a batch."""
    method = patch.find(patch.method(merged))
    of_logits = method.undo == "decoder" and not (merged.on_grid or merged.has_queries)
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


def _upsampling_call(model: Segmenter, batches: Sequence[Tensor]) -> Call:
    """From what the network gives to the label map, the last part of `predict`, as a function of a batch."""
    found = {batch.data_ptr(): model.network(batch) for batch in batches}
    return lambda batch: model.to_labels(found[batch.data_ptr()], batch.shape[-2:])


def _ratios(turns: Mapping[str, Tensor], pure: Cost, own: Cost) -> dict[str, float]:
    """Speed against the pure model, its share of the saved operations, and milliseconds of upsampling per image."""
    found = {"saving": pure.network / own.network}
    for name in ("scores", "predict"):
        mine, other = turns[name], turns[f"{name}_pure"]
        found[f"ratio_{name}"] = ratio(mine, other)
        found[f"share_{name}"] = realised_share(mine, other, own.network, pure.network)
    found["share_scores_low"], found["share_scores_high"] = (
        bound / found["saving"] for bound in ratio_interval(turns["scores"], turns["scores_pure"])
    )
    products = turns["products"], turns["products_pure"]
    found["share_products"] = realised_share(*products, own.network, pure.network)
    for name in ("_pure", ""):
        found[f"upsampling{name}_ms"] = 1000 / speed(turns[f"upsampling{name}"])
    found["ratio_predict_eager"] = ratio(turns["predict"], turns["predict_eager"])
    found["ratio_pure_eager"] = ratio(turns["predict_pure"], turns["predict_eager"])
    return found


def _overhead(turns: Mapping[str, Tensor], layers: Sequence[int]) -> dict[str, Any]:
    """Time of the merges, as shares of the pure pass."""
    shares = {name: share_of_time(turns["scores_pure"], rates) for name, rates in turns.items()}
    return {
        "overhead": {layer: shares[f"merge_{layer}"] for layer in layers},
        "overhead_undo": shares["undo"],
        "overhead_difference": shares["scores"] - shares["scores_free"],
    }


# ---------------------------------------------------------------------------------------------- memory


def peak_memory(call: Call, batch: Tensor, device: torch.device) -> float | None:
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


def _status(file: Path, key: str) -> int:
    """A number of KiB out of /proc/self/status."""
    return next(int(line.split()[1]) for line in file.read_text().splitlines() if line.startswith(key))
