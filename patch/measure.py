"""Methods side by side on one model and the same images: speed, operations, tokens, and how far features move."""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from patch.budget import grid_of, options_for, sets_cost
from patch.families.segmenter import is_segmenter
from patch.method import METHODS, PURE, find
from patch.observe import features
from patch.operations import count_operations
from patch.patching import apply, is_patched, method_of, options, reduction
from patch.trials import interleaved_trials, realized_share, speed

NEAR = 0.01  # how far from the budget methods may be, share of it

Given = Mapping[str, Any]


def benchmark(
    model: nn.Module,
    images: Tensor | Sequence[Tensor],
    methods: Iterable[str] | Mapping[str, tuple[str, Given]] | None = None,
    *,
    tokens: float = 0.5,
    repeats: int = 3,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Measure methods on one model and the same images, without training; needs no labels.

    A pass is the whole model, or encoder and decoder of a Segmenter. The methods are timed interleaved, batch by batch.

    Args:
        model: unpatched, in evaluation mode: all that `apply` takes. It stays as it is.
        images: (B, 3, H, W), on its device, normalized; or several such batches.
        methods: names; or label -> (method, options). None: all that the model takes without training. The plain model
            is measured first in any case.
        tokens: the budget of every method whose options do not say what it costs: patch tokens left on average, a share
            up to 1, else a number. It is met as nearly as the options allow.
        repeats: timed passes per method and batch.
        progress: show a bar.

    Returns:
        A dict per method: `name`, `method`, `options` in force; `images_per_second`; `gflops` per image, one per
        multiply-add; `tokens` left of `n_patches`, mean; `realized_share`, (speed ÷ plain speed) ÷ (plain operations ÷
        operations); `cosine`, layer by layer the cosine similarity of all patches' features to the plain model's, mean;
        `agreement`, share of the labels that are the plain model's, None where the model gives no class logits.

    Raises:
        ValueError: a patched model or one in training, no image, or a method or option that does not fit the model.
    """
    if is_patched(model) or model.training:
        raise ValueError("benchmark takes an unpatched model in evaluation mode: call patch.remove, and model.eval()")
    batches = [images] if isinstance(images, Tensor) else list(images)
    if not sum(map(len, batches)):
        raise ValueError("benchmark needs at least one image, (B, 3, H, W)")
    models = {PURE: shared_copy(model)} | _merged(model, batches, methods, tokens, progress)
    calls = {name: _network(one) for name, one in models.items()}
    trials = interleaved_trials(calls, batches, batches[0].device, repeats=repeats, warm=True, progress=progress)
    costs = {name: _operations(one, batches) for name, one in models.items()}
    moved = _movement(models, batches)
    n_patches = math.prod(grid_of(model, batches[0].shape[-2:]))
    rows = []
    for name, one in models.items():
        own = trials[name]
        chosen = (
            {"method": method_of(one), "options": options(one)} if is_patched(one) else {"method": PURE, "options": {}}
        )
        row = {"name": name, **chosen, "images_per_second": speed(own), "gflops": costs[name]}
        share = realized_share(own, trials[PURE], costs[name], costs[PURE])
        rows.append(row | {"n_patches": n_patches, "realized_share": share, **moved[name]})
    return rows


def shared_copy(model: nn.Module) -> Any:
    """A copy of a model that shares its parameters and buffers."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def untrained_methods() -> list[str]:
    """Names of the methods that act without parts that are learned first."""
    return [name for name, one in METHODS.items() if not one.uses_learned({})]


def _merged(
    model: nn.Module,
    batches: Sequence[Tensor],
    methods: Iterable[str] | Mapping[str, tuple[str, Given]] | None,
    tokens: float,
    progress: bool,
) -> dict[str, Any]:
    """Label -> a copy of the model with a method, at the budget where its options do not say what it costs."""
    named: Mapping[str, tuple[str, Given]]
    if isinstance(methods, Mapping):
        named = methods
    else:
        named = {name: (name, {}) for name in (untrained_methods() if methods is None else methods)}
    n_patches = math.prod(grid_of(model, batches[0].shape[-2:]))
    wanted = tokens * n_patches if tokens <= 1 else tokens
    if not 0 < wanted <= n_patches:
        raise ValueError(f"tokens {tokens}: the images have {n_patches} patches; give a share up to 1, or a number")
    merged: dict[str, Any] = {}
    bar = tqdm(named.items(), "options", unit="method", leave=False, disable=not progress)
    for label, (method, given) in bar:
        if method == PURE:
            continue
        try:
            needed = {} if sets_cost(method, given) else options_for(model, method, batches, wanted, near=NEAR, **given)
            merged[label] = apply(shared_copy(model), method, **{**given, **needed})
        except ValueError as error:
            if methods is not None:
                raise ValueError(f"{label}: {error}") from error
    return merged


def _network(model: Any) -> Any:
    return model.network if is_segmenter(model) else model


def _operations(model: Any, batches: Sequence[Tensor]) -> float:
    """10⁹ operations of a pass per image, mean over the batches."""
    same = not is_patched(model) or find(method_of(model)).is_static(options(model))
    found = [count_operations(model, images) for images in (batches[:1] if same else batches)]
    return sum(one.encoder + one.decoder for one in found) / len(found)


@torch.inference_mode()
def _movement(models: Mapping[str, Any], batches: Sequence[Tensor]) -> dict[str, dict[str, Any]]:
    """Of every model `tokens`, `cosine` and `agreement`; see `benchmark`."""
    n_images = sum(map(len, batches))
    found: dict[str, dict[str, Any]] = {name: {"tokens": 0.0, "cosine": {}, "agreement": None} for name in models}
    for images in batches:
        with features(models[PURE]) as seen:
            plain_labels, plain = _labels(models[PURE], images), dict(seen)
        for name, model in models.items():
            own, share = found[name], len(images) / n_images
            with features(model) as seen:
                labels = _labels(model, images)
            merged = reduction(model) if is_patched(model) else None
            counts = [math.prod(grid_of(model, images.shape[-2:]))] * len(images) if merged is None else merged.lengths
            own["tokens"] += sum(counts) / n_images
            for layer, x in seen.items():
                cosine = F.cosine_similarity(x.float(), plain[layer].float(), dim=-1).mean().item()
                own["cosine"][layer] = own["cosine"].get(layer, 0.0) + share * cosine
            if labels is not None and plain_labels is not None:
                same = (labels == plain_labels).float().mean().item()
                own["agreement"] = (own["agreement"] or 0.0) + share * same
    return {name: one | {"cosine": [*one["cosine"].values()]} for name, one in found.items()}


def _labels(model: Any, images: Tensor) -> Tensor | None:
    """The labels that a model gives: (B,) of images, or (B, H, W) of pixels; None: it has no head for classes."""
    if is_segmenter(model):
        return model.predict(images)
    output = model(images)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    has_head = not isinstance(output, Tensor) or getattr(model, "num_classes", 0) > 0
    return logits.argmax(1) if has_head and isinstance(logits, Tensor) else None
