"""The one entrance: put a merging method into a model and take it out again."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from g2tm import Reduction
from patch.families import family_of, models_within
from patch.families.base import RECORD, Patched, Record, check_forward, mix_in, mix_out, modules_of
from patch.families.segmenter import PatchedSegmenter, is_segmenter
from patch.learned import built_options, has_modules
from patch.method import DEFAULT, PURE, LossInput, Method, ModelShape, Step, complete, find
from patch.track import Merging

Model = TypeVar("Model", bound=nn.Module)

logger = logging.getLogger(__name__)


def apply(model: Model, method: str = DEFAULT, **options: Any) -> Model:
    """Patch a model in place, so that its tokens merge on the way and every patch gets its token back in the end.

    No parameter and no state-dict key changes. Images of a batch that keep different numbers of tokens are not padded
    but concatenated, (1, T, D), while they are between blocks, where attention runs fused and no hook looks into a
    block. Hooks on blocks of timm see merged tokens, one row per image; those on blocks of transformers and of
    mmsegmentation see all patches, each with the features of the token that carries it. What a hook returns goes on.

    Args:
        model: a Segmenter, whose logits come back for all patches; a plain ViT of timm (`VisionTransformer`, `Eva`),
            of transformers or of mmsegmentation, which gives back all tokens, each with the features of the token that
            carries it; or a model that holds exactly one of these (wrappers are looked through).
        method: a registered name, such as "graph"; by default the recommended one. "pure" leaves the model unpatched,
            `is_patched` stays False, and says so in the log (logger `patch.patching`, level INFO).
        options: options of the method; None means its default. All methods take
            layers: 1-based layers in which to merge, ascending;
            attention: "none", "proportional" or "inverse", how merged tokens count as keys afterwards;
            batch: "ragged" (every image keeps its own number of tokens) or "uniform".
            The others: `patch.find(method).options`.

    Returns:
        The model.

    Raises:
        ValueError: the model is patched already or cannot be patched, or an option is not allowed.
    """
    if method == PURE:
        _check_pure(options)
        if is_patched(model):
            raise ValueError(f"the model is patched with {method_of(model)}: for {PURE} call patch.remove")
        logger.info("%s: nothing merges, the model stays as it is", PURE)
    else:
        attach(model, find(method), options)
    return model


def _check_pure(options: Mapping[str, Any]) -> None:
    """Raise a ValueError for options where nothing merges."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{PURE} merges nothing and takes no {', '.join(given)}: name a method, or leave them out")


def attach(model: nn.Module, entry: Method, options: dict[str, Any]) -> None:
    """Patch a model with a method, registered or not; see `apply`."""
    from timm.models.vision_transformer import Block  # here, for timm takes longer to import than PyTorch

    from patch.families.timm_vit import PatchedTimmBlock, check_kind

    parts, method = parts_of(model), entry.name
    encoder, family = parts.encoder, family_of(parts.encoder)
    if is_patched(encoder):
        raise ValueError(f"the model is patched with {method_of(encoder)} already: call patch.remove first")
    if any(isinstance(module, Patched) for module in parts.model.modules()):
        raise ValueError("a part of the model is patched or compiled already: call patch.remove, patch, then compile")
    family.check(encoder)
    check_kind("block", parts.more_blocks, Block)
    check_forward([parts.model, *modules_of(parts.more_blocks)])
    blocks = family.blocks(encoder)
    if len({*blocks, *parts.more_blocks}) < len(blocks) + len(parts.more_blocks):
        raise ValueError("cannot patch a model that runs one block twice: a block merges at one place")
    shape = ModelShape(len(blocks), family.grid(encoder))
    completed = complete(entry, shape, built_options(encoder, entry, options))
    if entry.uses_learned(completed) and not has_modules(encoder, method):
        raise ValueError(
            f"{method} has learned parts, which this model lacks: call patch.add_modules(encoder, {method!r})"
        )
    if entry.needs_cls and not family.has_cls(encoder):
        raise ValueError(f"{method} goes by the attention of the CLS token, which this model lacks: choose another one")
    if family.shows_all and completed.get("restore_at") in ("after_norm", "none"):
        raise ValueError(
            f"restore_at {completed['restore_at']!r}: {family.name} give all patches back behind their last block, "
            "choose before_norm, or the number of a block"
        )
    places = _slots(entry.place_in(completed), completed["layers"])
    tables = family.grid, family.rotary_table
    merging = Merging(entry, completed, shape, family.n_prefix(encoder), tuple(places), *tables)
    joining = family.n_queries(encoder)[1] - 1
    for index, block in enumerate(blocks):
        n_around = family.tokens_before(encoder, index), 0
        mix_in(
            block, family.block_mixin, _patch=Record(merging, index, n_around, places.get(index, {}), index == joining)
        )
    for index, block in enumerate(parts.more_blocks, len(blocks)):
        mix_in(block, PatchedTimmBlock, _patch=Record(merging, index, n_around=(0, parts.model.n_cls)))
    family.attach(encoder, merging)
    if parts.model is not encoder:
        mix_in(parts.model, PatchedSegmenter, _patch=Record(merging))


class Parts(NamedTuple):
    """A model taken apart: the Segmenter, or the ViT itself; its ViT; and further blocks that see its tokens."""

    model: Any
    encoder: Any
    more_blocks: list[nn.Module]


def parts_of(model: nn.Module) -> Parts:
    """The one Segmenter or ViT that a model is or holds.

    Raises:
        ValueError: it holds several.
    """
    found = models_within(model)
    if len(found) > 1:
        raise ValueError(f"the model holds {len(found)} ViTs: choose one of {', '.join(found)}")
    own: Any = next(iter(found.values()), model)
    return Parts(own, own.encoder, list(own.decoder.blocks)) if is_segmenter(own) else Parts(own, own, [])


def _slots(place: str, layers: tuple[int, ...]) -> dict[int, dict[str, int]]:
    """Index of a block -> where in it a merge takes place, and the layer that the method calls it."""
    slots: dict[int, dict[str, int]] = {}
    for layer in layers:
        index, where = (0, "before") if layer == 0 else (layer - 1, place)
        slots.setdefault(index, {})[where] = layer
    return slots


def check(method: str, depth: int, grid: tuple[int, int], **options: Any) -> dict[str, Any]:
    """Check a method and its options without a model.

    Args:
        method, options: see `apply`.
        depth: number of blocks of the encoder.
        grid: (gh, gw), patches of the images that it is made for.

    Returns:
        All options as they would be in force.

    Raises:
        ValueError: what `apply` would refuse.
    """
    if method == PURE:
        _check_pure(options)
        return {}
    return complete(find(method), ModelShape(depth, (grid[0], grid[1])), options)


def remove(model: Model) -> Model:
    """Undo `apply`, and `compile`: the model is exactly what it was before. Without them, nothing happens.

    Raises:
        ValueError: a patched module got a `forward` of its instance since, which would go on calling the patch.
    """
    patched = [module for module in model.modules() if isinstance(module, Patched)]
    check_forward(patched)
    for module in patched:
        mix_out(module)
    return model


def is_patched(model: nn.Module) -> bool:
    """Return whether `apply` was called, on the model or on a ViT that it holds."""
    found: list[Any] = [*models_within(model).values()]
    return any(RECORD in vars(one.encoder if is_segmenter(one) else one) for one in found)


def reduction(model: nn.Module) -> Reduction | None:
    """The composed `Reduction` of this thread's last forward pass, from all patches to the tokens that were left.

    Prefix tokens are left out. None if nothing was merged yet.

    Raises:
        ValueError: the model is not patched.
    """
    last = merging_of(model).last
    return None if last is None else last.reduction


def loss(model: nn.Module, labels: Tensor | None = None) -> Tensor | float:
    """The part of the loss that a learned method adds after this thread's last training pass; 0 for the others.

    Args:
        model: patched.
        labels: (B, H, W), of the images.

    Raises:
        ValueError: the model is not patched, or there is no training pass in this thread, or its output is gone, or it
            recorded no gradients where they are asked for.
    """
    merging = merging_of(model)
    own = merging.method.loss
    if own is None or not merging.method.trains_softly(merging.options):
        return 0.0
    track = merging.thread.trained[-1].track() if merging.thread.trained else None
    if track is None:
        raise ValueError(
            f"{merging.method.name} has no training pass of this thread whose output is still there: call patch.loss "
            "after the forward pass, in its thread, before its output is released"
        )
    encoder, grid = track.encoder, track.grid
    assert grid is not None
    height, width = encoder.patch_embed.patch_size
    known = (encoder.blocks, encoder.embed_dim, grid, merging.n_prefix)
    added = own(LossInput(track.soft_steps, *known, track.options, labels, (int(height), int(width))))
    if torch.is_grad_enabled() and not (track.has_grad or added.requires_grad):
        raise ValueError(
            "the training pass recorded no gradients for patch.loss: take away torch.no_grad, or call patch.loss under "
            "it too; a checkpoint around the model takes use_reentrant=False"
        )
    return added


def method_of(model: nn.Module) -> str:
    """Name of the method in force.

    Raises:
        ValueError: the model is not patched.
    """
    return merging_of(model).method.name


def options(model: nn.Module) -> dict[str, Any]:
    """The options in force.

    Raises:
        ValueError: the model is not patched.
    """
    return dict(merging_of(model).options)


def set_threshold(model: nn.Module, threshold: float) -> None:
    """Change the threshold from now on, e.g. along a curriculum.

    Raises:
        ValueError: the model is not patched, its method has no threshold, or the value is not allowed.
    """
    merging = merging_of(model)
    if not merging.method.takes("threshold"):
        raise ValueError(f"{merging.method.name} has no threshold")
    merging.options = complete(merging.method, merging.shape, {**merging.options, "threshold": threshold})


@contextmanager
def replaced_merge(model: nn.Module, merge: Callable[[Step], Reduction | None]) -> Iterator[None]:
    """While open, another function takes the place of the method's own in this thread: to record merges, or to replay
    them."""
    thread = merging_of(model).thread
    before, thread.merge = thread.merge, merge
    try:
        yield
    finally:
        thread.merge = before


def merging_of(model: nn.Module) -> Merging:
    """The record of the patch in a model.

    Raises:
        ValueError: the model is not patched.
    """
    record = vars(parts_of(model).encoder).get(RECORD)
    if record is None:
        raise ValueError("the model is not patched: call patch.apply first")
    return record.merging
