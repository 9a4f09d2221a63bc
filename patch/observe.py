"""Look at tokens: those of an unpatched model where a method would merge them, and what a patched one merges."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from g2tm import Reduction, edge_similarities
from g2tm.statistics import similarity_moments
from patch.method import COMMON, Method, Step, check_layers
from patch.patching import attach, is_patched, merging_of, remove


@contextmanager
def similarities(encoder: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, every forward pass adds to the moments of the pairwise similarities after attention.

    Args:
        encoder: a model that `patch.apply` knows, unpatched.
        layers: 1-based, ascending.

    Yields:
        layer -> `similarity_moments` of its patch tokens, summed over all images so far; empty at first.

    Raises:
        ValueError: layers that the encoder lacks, or not in ascending order, or a patched encoder.
    """
    moments: dict[int, Tensor] = {}

    def add(step: Step) -> None:
        moments[step.layer] = moments.get(step.layer, 0) + similarity_moments(step.x)

    with _observed(encoder, layers, add):
        yield moments


@contextmanager
def edges(encoder: nn.Module, layer: int) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass notes how similar neighboring patches are where a layer would merge them.

    `graph_merge` keeps the edges above its threshold: what it would do at any threshold can be told from these.

    Args:
        encoder: a model that `patch.apply` knows, unpatched.
        layer: 1-based.

    Yields:
        dict of `right`, (B, gh, gw-1), and `down`, (B, gh-1, gw): the cosine similarities of the patch tokens after
        attention, float32, of the last pass; empty at first. (gh, gw) is the grid of the images of that pass.

    Raises:
        ValueError: a layer that the encoder lacks, or a patched encoder.
    """
    found: dict[str, Tensor] = {}

    def note(step: Step) -> None:
        found["right"], found["down"] = edge_similarities(step.x, step.grid)

    with _observed(encoder, [layer], note):
        yield found


@contextmanager
def tokens(encoder: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, every forward pass notes the patch tokens where the layers would merge them.

    Args:
        encoder: a model that `patch.apply` knows, unpatched.
        layers: 1-based, ascending.

    Yields:
        layer -> (B, N, D), the patch tokens after attention of the last pass; empty at first.

    Raises:
        ValueError: layers that the encoder lacks, or not in ascending order, or a patched encoder.
    """
    found: dict[int, Tensor] = {}

    def note(step: Step) -> None:
        found[step.layer] = step.x

    with _observed(encoder, layers, note):
        yield found


@contextmanager
def features(model: nn.Module) -> Iterator[dict[int, Tensor]]:
    """While open, every forward pass of this thread notes what the blocks of a ViT give.

    Args:
        model: patched or not.

    Yields:
        layer, 1-based -> (B, N, D), all patch tokens of the last pass, each with the features of the token that
        carries it; empty at first.

    Raises:
        ValueError: a model that cannot be patched.
    """
    found: dict[int, Tensor] = {}
    unpatched = not is_patched(model)
    if unpatched:
        attach(model, Method("observed", _Observers(), COMMON, static=True), {})
    thread = merging_of(model).thread
    try:
        thread.watch = lambda index, x: found.update({index + 1: x.detach()})
        yield found
    finally:
        thread.watch = None
        if unpatched:
            remove(model)


class _Observers:
    """Functions that look at the steps of some layers each; nothing merges."""

    def __init__(self) -> None:
        self.looks: list[list[Any]] = []

    def __call__(self, step: Step) -> None:
        for layers, look in self.looks:
            if step.layer in layers:
                look(step)


@contextmanager
def _observed(model: nn.Module, layers: Sequence[int], look: Callable[[Step], None]) -> Iterator[None]:
    """While open, a function sees every step at which the layers would merge."""
    if not is_patched(model):
        attach(model, Method("observed", _Observers(), COMMON, static=True), {})
    merging = merging_of(model)
    observers = merging.method.merge
    if not isinstance(observers, _Observers):
        raise ValueError("the model is patched, so its tokens leave the grid: call patch.remove first")
    own: list[Any] = []
    try:
        own += check_layers(layers, merging.shape.depth), look
        observers.looks.append(own)
        yield
    finally:
        observers.looks[:] = [one for one in observers.looks if one is not own]
        if not observers.looks:
            remove(model)


def reductions(model: nn.Module) -> dict[int, Reduction]:
    """The reductions of this thread's last forward pass, layer by layer.

    Args:
        model: patched or not.

    Returns:
        layer -> composed `Reduction` from all patches to the tokens after that layer's merge, in order; empty where
        nothing merged.
    """
    last = merging_of(model).last if is_patched(model) else None
    return {} if last is None else dict(last.steps)


@contextmanager
def merge_ranges(model: nn.Module, name: str = "merge") -> Iterator[None]:
    """While open, a profiler sees every merge and its undoing as ranges called `name`.

    Args:
        model: patched or not; an unpatched one has none.
    """
    if not is_patched(model):
        yield
        return
    merging = merging_of(model)
    merging.range_name = name
    try:
        yield
    finally:
        merging.range_name = None
