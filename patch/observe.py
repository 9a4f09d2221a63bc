"""Look at tokens: those of an unpatched model where a method would merge them, and what a patched one merges."""

from contextlib import contextmanager

from torch.profiler import record_function

from g2tm import edge_similarities
from g2tm.statistics import mean_and_std, similarity_moments
from patch.registry import check_layers

__all__ = ["edges", "mean_and_std", "merge_ranges", "reductions", "similarities"]


@contextmanager
def similarities(encoder, layers):
    """While open, every forward pass adds to the moments of the pairwise similarities after attention.

    Args:
        encoder: a timm ViT, unpatched.
        layers: 1-based, ascending.

    Yields:
        layer -> `similarity_moments` of its patch tokens, summed over all images so far; empty at first.

    Raises:
        ValueError: a layer that the encoder lacks, or not in ascending order.
    """
    layers = check_layers(layers, len(encoder.blocks))
    moments = {}

    def observe(layer):
        def add(norm2, inputs):  # what enters the second norm is the residual stream after attention
            new = similarity_moments(inputs[0][:, encoder.num_prefix_tokens :])
            moments[layer] = moments.get(layer, 0) + new

        return encoder.blocks[layer - 1].norm2.register_forward_pre_hook(add)

    handles = [observe(layer) for layer in layers]
    try:
        yield moments
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def edges(encoder, layer):
    """While open, every forward pass notes how similar neighbouring patches are where a layer would merge them.

    `graph_merge` keeps the edges above its threshold: what it would do at any threshold can be told from these.

    Args:
        encoder: a timm ViT, unpatched.
        layer: 1-based.

    Yields:
        dict of `right`, (B, gh, gw-1), and `down`, (B, gh-1, gw): the cosine similarities of the patch tokens after
        attention, float32, of the last pass; empty at first. (gh, gw) is the grid of the images of that pass.

    Raises:
        ValueError: a layer that the encoder lacks, or a patched encoder, whose tokens may have merged by then.
    """
    depth = len(encoder.blocks)
    if not 1 <= layer <= depth:
        raise ValueError(f"layer {layer}: the encoder has layers 1 to {depth}")
    if any(hasattr(block, "merging") for block in encoder.blocks):
        raise ValueError("the model is patched, so its tokens leave the grid: call patch.remove first")
    found, grid = {}, []

    def note_grid(patch_embed, inputs, output):
        grid[:] = output.shape[1:3] if output.ndim == 4 else patch_embed.grid_size

    def note_edges(norm2, inputs):  # what enters the second norm is the residual stream after attention
        x = inputs[0][:, encoder.num_prefix_tokens :]
        found["right"], found["down"] = edge_similarities(x, grid)

    handles = [
        encoder.patch_embed.register_forward_hook(note_grid),
        encoder.blocks[layer - 1].norm2.register_forward_pre_hook(note_edges),
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reductions(model):
    """While open, every forward pass notes what was merged by when.

    Args:
        model: patched or not.

    Yields:
        1-based layer -> composed `Reduction` from all patches to the tokens after that layer's merge, of the last
        pass; empty while nothing merged.
    """
    steps = {}
    if not hasattr(model, "merging"):
        yield steps
        return
    model.merging.on_merge = steps.__setitem__
    try:
        yield steps
    finally:
        model.merging.on_merge = None


@contextmanager
def merge_ranges(model, name="merge"):
    """While open, a profiler sees every merge and its undoing as ranges called `name`.

    Args:
        model: patched or not; an unpatched one has none.
    """
    if not hasattr(model, "merging"):
        yield
        return
    reduce, to_grid = model.merging.reduce, getattr(model, "to_grid", None)

    def named_reduce(*args):
        with record_function(name):
            return reduce(*args)

    def named_forward(*args):
        with record_function(name):
            return type(to_grid).forward(to_grid, *args)

    model.merging.reduce = named_reduce
    if to_grid is not None:
        to_grid.forward = named_forward
    try:
        yield
    finally:
        del model.merging.reduce
        if to_grid is not None:
            del to_grid.forward
