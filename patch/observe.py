"""Look at tokens: those of an unpatched model where a method would merge them, and what a patched one merges."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from torch import Tensor, nn

from g2tm import Reduction, edge_similarities
from g2tm.statistics import similarity_moments
from patch.families import family_of
from patch.method import check_layers
from patch.patching import is_patched, merging_of


@contextmanager
def similarities(encoder: nn.Module, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """While open, every forward pass adds to the moments of the pairwise similarities after attention.

    Args:
        encoder: a ViT that `patch.apply` knows, unpatched.
        layers: 1-based, ascending.

    Yields:
        layer -> `similarity_moments` of its patch tokens, summed over all images so far; empty at first.

    Raises:
        ValueError: layers that the encoder lacks, or not in ascending order, or a patched encoder.
    """
    blocks, prefix = _unpatched(encoder)
    moments: dict[int, Tensor] = {}

    def add(layer: int, norm2: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        new = similarity_moments(inputs[0][:, prefix:])  # what enters norm2 is the residual stream after attention
        moments[layer] = moments.get(layer, 0) + new

    with ExitStack() as stack:
        for layer in check_layers(layers, len(blocks)):
            stack.enter_context(blocks[layer - 1].norm2.register_forward_pre_hook(partial(add, layer)))
        yield moments


@contextmanager
def edges(encoder: nn.Module, layer: int) -> Iterator[dict[str, Tensor]]:
    """While open, every forward pass notes how similar neighboring patches are where a layer would merge them.

    `graph_merge` keeps the edges above its threshold: what it would do at any threshold can be told from these.

    Args:
        encoder: a ViT that `patch.apply` knows, unpatched.
        layer: 1-based.

    Yields:
        dict of `right`, (B, gh, gw-1), and `down`, (B, gh-1, gw): the cosine similarities of the patch tokens after
        attention, float32, of the last pass; empty at first. (gh, gw) is the grid of the images of that pass.

    Raises:
        ValueError: a layer that the encoder lacks, or a patched encoder.
    """
    blocks, prefix = _unpatched(encoder)
    (layer,) = check_layers(layer, len(blocks))
    found: dict[str, Tensor] = {}
    grid: list[int] = []

    def note_grid(patch_embed: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        grid[:] = family_of(encoder).grid(encoder, inputs[0].shape[-2:])

    def note_edges(norm2: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found["right"], found["down"] = edge_similarities(inputs[0][:, prefix:], tuple(grid))

    with (
        encoder.patch_embed.register_forward_pre_hook(note_grid),
        blocks[layer - 1].norm2.register_forward_pre_hook(note_edges),
    ):
        yield found


def _unpatched(encoder: nn.Module) -> tuple[Sequence[nn.Module], int]:
    """Blocks and number of prefix tokens of an encoder whose tokens are all there."""
    if is_patched(encoder):
        raise ValueError("the model is patched, so its tokens leave the grid: call patch.remove first")
    family = family_of(encoder)
    return family.blocks(encoder), family.prefix(encoder)


def reductions(model: nn.Module) -> dict[int, Reduction]:
    """What was merged by when in this thread's last forward pass.

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
