"""Options with which a method costs as much as another: so many tokens, or so many operations."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import patch
from segm.eval.cost import count_operations
from segm.model.segmenter import Segmenter

BISECTIONS = 25
NEAR = 1e-3  # share of the wanted cost
# The option that sets a method's cost, and its range; r is a whole number up to all tokens of the image.
KNOBS: dict[str, tuple[str, float, float]] = {
    "graph": ("threshold", -1.0, 1.0),
    "algm": ("threshold", -1.0, 1.0),
    **dict.fromkeys(("tome", "tofu", "dct", "pitome", "mctf", "crossget", "dtem", "diffrate"), ("r", 0, 0)),
    "atc": ("keep", 0.05, 1.0),
    "ltmp": ("merge_threshold", 0.0, 1.0),
    **dict.fromkeys(("random", "expedit"), ("tokens", 0.02, 1.0)),
    "keymatch": ("tokens", 0.08, 1.0),  # four merges keep at least a sixteenth
    "cubist": ("tokens", 0.35, 1.0),  # one merge keeps at least a quarter
}
FLAGS = {name: "--" + name.replace("_", "-") for name in ("patch_size", *(knob[0] for knob in KNOBS.values()))}
FLAGS["keep"] = "--keep-rate"
FIXED = ("fpet", "mpm", "clustvit")  # no option sets their cost
NEEDS_TRAINING = ("dtem", "clustvit")

Cost = Callable[[Segmenter, Sequence[Tensor]], float]


def tokens_left(model: Segmenter, batches: Sequence[Tensor]) -> float:
    """Patch tokens that the encoder of a patched model leaves, mean over the images (B, 3, H, W)."""
    counts: list[int] = []
    for images in batches:
        model.encoder.forward_features(images)
        reduction = patch.reduction(model)
        assert reduction is not None  # a pass has just run
        counts += reduction.counts.tolist()
    return sum(counts) / len(counts)


def gflops(model: Segmenter, batches: Sequence[Tensor]) -> float:
    """10⁹ operations per image, mean over the batches (B, 3, H, W)."""
    return sum(count_operations(model, images).total for images in batches) / len(batches)


@torch.inference_mode()
def options_for(
    model: Segmenter, method: str, batches: Sequence[Tensor], wanted: float, cost_of: Cost = tokens_left, **fixed: Any
) -> dict[str, Any]:
    """Options with which a method costs about as much as wanted; only the fixed ones where no option sets its cost.

    Args:
        model: unpatched, with the learned parts of the method.
        batches: images (B, 3, H, W).
        wanted: the cost, by default patch tokens per image at the end of the encoder.
        cost_of: from a patched model and batches to a cost.
        fixed: other options of the method.
    """
    if method not in KNOBS:
        return fixed
    name, low, high = KNOBS[method]
    model, own = copy.deepcopy(model), dict(fixed)
    if name == "r":
        high = 2 * math.prod(model.grid(batches[0].shape[-2:])) // len(model.encoder.blocks)
    if name == "threshold" and cost_of is tokens_left and not model.has_queries:  # no token leaves after the last merge
        grid = model.encoder.patch_embed.grid_size
        own["layers"] = [*patch.check(method, len(model.encoder.blocks), grid, **fixed)["layers"]]
        del model.encoder.blocks[own["layers"][-1] :]
    if patch.find(method).static:  # every image costs the same
        batches = batches[:1]
    best, value = math.inf, high
    for _ in range(BISECTIONS):
        middle = round((low + high) / 2) if name == "r" else (low + high) / 2
        cost = cost_of(patch.apply(model, method, **own, **{name: middle}), batches)
        patch.remove(model)
        if abs(cost - wanted) < best:
            best, value = abs(cost - wanted), middle
        removes_too_few = (cost > wanted) == (name == "r")  # r removes tokens, every other option keeps them
        low, high = (middle, high) if removes_too_few else (low, middle)
        if best <= NEAR * wanted or (name == "r" and high - low <= 1):
            break
    return {**fixed, name: value}
