"""Put a merging method into a Segmenter and take it out again."""

from patch.blocks import BeginPass, Merging, Unmerge, check_block, patch_block, unpatch_block
from patch.registry import resolve


def segmenter(model, method, **options):
    """Patch a Segmenter in place, so that its encoder merges tokens and its scores come back unmerged.

    No parameter and no state-dict key changes.

    Args:
        model: a `segm.model.segmenter.Segmenter`.
        method: a registered name, e.g. "graph".
        options: options of the method; None means its default. All methods take
            layers: 1-based layers in which to merge, ascending;
            attention: "none", "proportional" or "inverse", how merged tokens count as keys afterwards;
            batch: "ragged" (every image keeps its own number of tokens) or "uniform".
            graph also takes threshold (cosine similarity, 0.88) and backend.

    Returns:
        The model.

    Raises:
        ValueError: the model is patched already or cannot be patched, or an option is not allowed.
    """
    if is_patched(model):
        raise ValueError(f"the model is patched with {model.merging.name} already: call patch.remove first")
    encoder, decoder = model.encoder, model.decoder
    entry, settings = resolve(method, len(encoder.blocks), options)
    for block in (*encoder.blocks, *decoder.blocks):
        check_block(block)
    merging = Merging(method, entry, settings, encoder.num_prefix_tokens)
    for layer, block in enumerate(encoder.blocks, start=1):
        patch_block(block, merging, before=merging.prefix, merge_layer=layer if layer in settings["layers"] else None)
    for block in decoder.blocks:
        patch_block(block, merging, after=model.n_cls)
    model.to_grid = Unmerge(model.to_grid, merging)
    model.merging = merging
    model.merging_hook = encoder.patch_embed.register_forward_hook(BeginPass(merging))
    return model


def remove(model):
    """Undo `segmenter`: the model is exactly what it was before. Without a patch, nothing happens."""
    if not is_patched(model):
        return model
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        unpatch_block(block)
    model.to_grid = model.to_grid.to_grid
    model.merging_hook.remove()
    del model.merging, model.merging_hook
    return model


def is_patched(model):
    """Whether `segmenter` was applied."""
    return hasattr(model, "merging")


def reduction(model):
    """The composed `Reduction` of the last forward pass, from all patches to the tokens that were left.

    Prefix tokens are left out. None if nothing was merged yet.

    Raises:
        ValueError: the model is not patched.
    """
    return _merging(model).reduction


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
    merging.method.check(changed)
    merging.settings = changed


def _merging(model):
    if not is_patched(model):
        raise ValueError("the model is not patched: call patch.segmenter first")
    return model.merging
