"""Options with which a method leaves so many tokens, or costs so much, on some images."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from patch.families import family_of
from patch.families.segmenter import is_segmenter
from patch.method import find
from patch.patching import apply, check, merging_of, parts_of, reduction, remove

# Options that set what a method costs, the first that it takes, and their ranges; r is a whole number up to all tokens.
KNOBS = {
    "threshold": (-1.0, 1.0),
    "merge_threshold": (0.0, 1.0),
    "r": (0, 0),
    "keep": (0.05, 1.0),
    "tokens": (0.02, 1.0),
}
BISECTIONS = 25


def knob_of(method: str) -> str | None:
    """The option that sets what a method costs; None: no option does."""
    return next((name for name in KNOBS if find(method).takes(name)), None)


def sets_cost(method: str, options: Mapping[str, Any]) -> bool:
    """Return whether options say already what a method costs."""
    others = ("remove", "prune_kept", "merge_kept", "prune_threshold", "cluster_grid")
    return any(options.get(name) is not None for name in (*KNOBS, *others)) or knob_of(method) is None


def grid_of(model: nn.Module, size: Sequence[int]) -> tuple[int, int]:
    """Patches (gh, gw) of images of (height, width) pixels.

    Raises:
        ValueError: a model that cannot be patched.
    """
    parts = parts_of(model)
    if is_segmenter(parts.model):
        gh, gw = parts.model.grid(size)
        return int(gh), int(gw)
    return family_of(parts.encoder).grid(parts.encoder, size)


def tokens_left(model: Any, batches: Sequence[Tensor]) -> float:
    """Patch tokens that the encoder of a patched model leaves, mean over the images (B, 3, H, W)."""
    counts: list[int] = []
    for images in batches:
        model.encode(images) if is_segmenter(model) else model(images)
        found = reduction(model)
        assert found is not None  # a pass has just run
        counts += found.lengths
    return sum(counts) / len(counts)


@torch.inference_mode()
def options_for(
    model: Any,
    method: str,
    batches: Sequence[Tensor],
    wanted: float,
    cost_of: Callable[[Any, Sequence[Tensor]], float] = tokens_left,
    *,
    near: float = 1e-3,
    **fixed: Any,
) -> dict[str, Any]:
    """Options with which a method costs about as much as wanted; only the fixed ones where no option sets its cost.

    Args:
        model: unpatched, with the learned parts of the method.
        batches: images (B, 3, H, W).
        wanted: the cost, by default patch tokens per image at the end of the encoder.
        cost_of: from a patched model and batches to a cost.
        near: how far the cost may be off, share of it; where that cannot be reached, ten times the last step.
        fixed: other options of the method.
    """
    name, n_patches = knob_of(method), math.prod(grid_of(model, batches[0].shape[-2:]))
    if name is None:
        return fixed
    if name == "tokens" and cost_of is tokens_left:
        return {**fixed, name: wanted / n_patches}
    low, high = KNOBS[name]
    model, own = copy.deepcopy(model), dict(fixed)
    encoder = parts_of(model).encoder
    family = family_of(encoder)
    depth = len(family.blocks(encoder))
    if name == "r":
        high = 2 * n_patches // depth
    is_plain = is_segmenter(model) or model is encoder
    if name == "threshold" and cost_of is tokens_left and is_plain and not family.n_queries(encoder)[0]:
        own["layers"] = [*check(method, depth, family.grid(encoder), **fixed)["layers"]]
        if isinstance(getattr(encoder, "blocks", None), nn.ModuleList):
            del encoder.blocks[own["layers"][-1] :]  # no token leaves after the last merge
    if find(method).static:  # every image costs the same
        batches = batches[:1]
    best, value = math.inf, high
    for _ in range(BISECTIONS):
        middle = round((low + high) / 2) if name == "r" else (low + high) / 2
        try:
            apply(model, method, **own, **{name: middle})
            merging_of(model).noted = True  # a search also tries what leaves few tokens
            cost = cost_of(model, batches)
        except ValueError:
            if name != "tokens":
                raise
            low = middle  # fewer tokens than the method can leave
            continue
        finally:
            remove(model)
        if abs(cost - wanted) < best:
            best, value = abs(cost - wanted), middle
        removes_too_few = (cost > wanted) == (name == "r")  # r removes tokens, every other option keeps them
        low, high = (middle, high) if removes_too_few else (low, middle)
        if best <= near * wanted or high - low <= (1 if name == "r" else near / 10):
            break
    return {**fixed, name: value}
