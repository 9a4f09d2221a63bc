"""Put a merging method into a model and take it out again."""

from functools import cache

import torch
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer

from patch.blocks import (
    BeginPass,
    Merging,
    Unmerge,
    Watchers,
    check_block,
    check_checkpointing,
    patch_block,
    unpatch_block,
)
from patch.compiled import is_compiled, uncompile
from patch.registry import Encoder, resolve


def segmenter(model, method, **options):
    """Patch a Segmenter in place, so that its encoder merges tokens and its scores come back unmerged.

    No parameter and no state-dict key changes. Images of a batch that keep different numbers of tokens are not padded
    but stand behind each other, (1, T, D), while they are between blocks, where attention runs fused and no hook
    looks into a block.

    Args:
        model: a `segm.model.segmenter.Segmenter`.
        method: a registered name, e.g. "graph".
        options: options of the method; None means its default. All methods take
            layers: 1-based layers in which to merge, ascending;
            attention: "none", "proportional" or "inverse", how merged tokens count as keys afterwards;
            batch: "ragged" (every image keeps its own number of tokens) or "uniform".
            graph also takes threshold (cosine similarity, 0.88) and backend;
            algm takes threshold, window (patches; None: every layer is GBM) and gbm_threshold ("adaptive", "tau" or
            a number); tome takes r (tokens per layer, a list with one per layer, or a pair (r, inflection)).

    Returns:
        The model.

    Raises:
        ValueError: the model is patched already or cannot be patched, or an option is not allowed.
    """
    if not all(hasattr(model, name) for name in ("encoder", "decoder", "to_grid")):
        raise ValueError(f"cannot patch a {type(model).__name__} as a Segmenter: take patch.timm for a ViT of timm")
    merging = _install(model, model.encoder, method, options, model.decoder.blocks)
    for block in model.decoder.blocks:
        patch_block(block, merging, after=model.n_cls, last=block is model.decoder.blocks[-1])
    model.to_grid = Unmerge(model.to_grid, merging)
    return model


def timm(vit, method, **options):
    """Patch a plain ViT of timm in place.

    `forward_features` gives back all tokens, each with the features of the token that carries it; what `forward`
    pools is therefore weighted by size, and padding takes no part.

    Args:
        vit: a timm `VisionTransformer` (DeiT, DINOv2, SigLIP, DeiT-III, ... included).
        method, options: see `segmenter`.

    Returns:
        The model.

    Raises:
        ValueError: as `segmenter`, and for a model that is no plain ViT.
    """
    if not isinstance(vit, VisionTransformer):
        raise ValueError(f"cannot patch a {type(vit).__name__}: only timm's VisionTransformer is known")
    _install(vit, vit, method, options)
    vit.__class__ = _unmerging(type(vit))
    return vit


class _UnmergedFeatures:
    """Undoes the merge at the end of the features of a ViT."""

    def forward_features(self, x, *args, **kwargs):
        """images -> (B, P + N, D)"""
        x = super().forward_features(x, *args, **kwargs)
        if self.merging.reduction is None:
            return x
        prefix = self.merging.prefix
        return torch.cat([x[:, :prefix], self.merging.reduction.unmerge(x[:, prefix:])], dim=1)

    def forward_intermediates(self, *args, **kwargs):
        """timm would put the merged tokens on the grid as if they were all patches."""
        raise ValueError(
            "a patched ViT cannot give intermediate features on the grid: use forward_features, or patch.remove first"
        )

    get_intermediate_layers = forward_intermediates


@cache
def _unmerging(vit_class):
    return type(f"Patched{vit_class.__name__}", (_UnmergedFeatures, vit_class), {})


def _install(model, encoder, method, options, more_blocks=()):
    """Check everything, then let the blocks of an encoder merge; returns the shared state."""
    if is_patched(model):
        raise ValueError(f"the model is patched with {model.merging.name} already: call patch.remove first")
    if is_compiled(model):
        raise ValueError("the model is compiled already: call patch.remove first, and patch before compiling")
    target = Encoder(len(encoder.blocks), tuple(encoder.patch_embed.grid_size))
    entry, settings = resolve(method, target, options)
    for block in (*encoder.blocks, *more_blocks):
        check_block(block)
    check_checkpointing(encoder)
    if isinstance(encoder.patch_drop, PatchDropout):
        raise ValueError("cannot patch a model with patch dropout: its tokens do not fill the grid")
    merging = Merging(method, entry, settings, target, encoder.num_prefix_tokens)
    depth = len(encoder.blocks)
    for layer, block in enumerate(encoder.blocks, start=1):
        merge_layer = layer if layer in settings["layers"] else None
        patch_block(block, merging, before=merging.prefix, merge_layer=merge_layer, last=layer == depth)
    modules = [module for block in (*encoder.blocks, *more_blocks) for module in block.modules()]
    merging.watchers = Watchers(modules, own=sum(hasattr(block, "keys_hook") for block in encoder.blocks))
    model.merging = merging
    model.merging_hook = encoder.patch_embed.register_forward_hook(BeginPass(merging, encoder))
    return merging


def check(method, depth, grid, **options):
    """Check a method and its options without a model.

    Args:
        method, options: see `segmenter`.
        depth: number of blocks of the encoder.
        grid: (gh, gw), patches of the images that it is made for.

    Returns:
        All options as they would be in force.

    Raises:
        ValueError: what `segmenter` would refuse.
    """
    return resolve(method, Encoder(depth, tuple(grid)), options)[1]


def remove(model):
    """Undo `segmenter` or `timm`, and `compile`: the model is exactly what it was before. Without them, nothing
    happens."""
    uncompile(model)
    if not is_patched(model):
        return model
    if isinstance(model, _UnmergedFeatures):
        model.__class__ = type(model).__mro__[2]
        blocks = model.blocks
    else:
        model.to_grid = model.to_grid.to_grid
        blocks = (*model.encoder.blocks, *model.decoder.blocks)
    for block in blocks:
        unpatch_block(block)
    model.merging_hook.remove()
    del model.merging, model.merging_hook
    return model


def is_patched(model):
    """Whether `segmenter` or `timm` was applied."""
    return hasattr(model, "merging")


def reduction(model):
    """The composed `Reduction` of the last forward pass, from all patches to the tokens that were left.

    Prefix tokens are left out. None if nothing was merged yet.

    Raises:
        ValueError: the model is not patched.
    """
    return _merging(model).reduction


def method(model):
    """Name of the method in force.

    Raises:
        ValueError: the model is not patched.
    """
    return _merging(model).name


def settings(model):
    """The options in force, as a dict.

    Raises:
        ValueError: the model is not patched.
    """
    return dict(_merging(model).settings)


def set_threshold(model, threshold):
    """Change the threshold from now on, e.g. along a curriculum.

    Raises:
        ValueError: the model is not patched, its method has no threshold, or the value is not allowed.
    """
    merging = _merging(model)
    if "threshold" not in merging.settings:
        raise ValueError(f"{merging.name} has no threshold")
    changed = merging.settings | {"threshold": threshold}
    merging.method.check(changed, merging.encoder)
    merging.settings = changed


def _merging(model):
    if not is_patched(model):
        raise ValueError("the model is not patched: call patch.segmenter or patch.timm first")
    return model.merging
