"""Look at the tokens of an unpatched model where a method would merge them."""

from contextlib import contextmanager

from g2tm.statistics import mean_and_std, similarity_moments

__all__ = ["mean_and_std", "similarities"]


@contextmanager
def similarities(encoder, layers):
    """While open, every forward pass adds to the moments of the pairwise similarities after attention.

    Args:
        encoder: a timm ViT, unpatched.
        layers: 1-based.

    Yields:
        layer -> `similarity_moments` of its patch tokens, summed over all images so far; empty at first.

    Raises:
        ValueError: a layer that the encoder lacks.
    """
    depth = len(encoder.blocks)
    if not all(1 <= layer <= depth for layer in layers):
        raise ValueError(f"layers {list(layers)}: the encoder has layers 1 to {depth}")
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
