"""The one entrance: put a merging method into a model and take it out again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

from timm.models.vision_transformer import Block
from torch import Tensor, nn

from g2tm import Reduction
from patch.families import family_of, vit_within
from patch.families.base import Patched, put_in_front, take_away
from patch.families.segmenter import PatchedSegmenter, is_segmenter
from patch.families.timm_vit import PatchedTimmBlock, check_blocks
from patch.learned import has_modules
from patch.method import Step, Target, Trained, resolve
from patch.state import Merging, Watchers

Model = TypeVar("Model", bound=nn.Module)


def apply(model: Model, method: str, **options: Any) -> Model:
    """Patch a model in place, so that its tokens merge on the way and every patch gets its token back in the end.

    No parameter and no state-dict key changes. Images of a batch that keep different numbers of tokens are not padded
    but concatenated, (1, T, D), while they are between blocks, where attention runs fused and no hook looks into a
    block.

    Args:
        model: a Segmenter, whose logits come back for all patches; or a plain ViT of timm (`VisionTransformer`, `Eva`),
            whose `forward_features` gives back all tokens, each with the features of the token that carries it.
        method: a registered name, such as "graph".
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
    encoder, more_blocks = _parts(model)
    if is_patched(encoder):
        raise ValueError(f"the model is patched with {encoder.merging.method.name} already: call patch.remove first")
    if isinstance(encoder, Patched):
        raise ValueError("the model is compiled already: call patch.remove first, and patch before compiling")
    family = family_of(encoder)
    blocks = family.blocks(encoder)
    check_blocks(more_blocks, Block)
    target = Target(len(blocks), family.grid(encoder))
    entry, completed = resolve(method, target, options)
    if entry.learns(completed) and not has_modules(encoder, method):
        raise ValueError(
            f"{method} has learned parts, which this model lacks: call patch.add_modules(encoder, {method!r})"
        )
    if "row" in entry.needs and not family.has_cls(encoder):
        raise ValueError(f"{method} goes by the attention of the CLS token, which this model lacks: choose another one")
    watchers = Watchers(module for block in (*blocks, *more_blocks) for module in block.modules())
    merging = Merging(entry, completed, target, family.prefix(encoder), watchers)
    places = _places(entry.place_of(completed), completed["layers"], len(blocks))
    for index, block in enumerate(blocks, start=1):
        front, last = family.in_front(encoder, index)
        own = {"neighbors": (front, 0), "places": places.get(index, {}), "last": last, "index": index - 1}
        put_in_front(block, family.block_front, merging=merging, **own)
    for block in more_blocks:
        own = {"neighbors": (0, model.n_cls), "places": {}, "last": block is more_blocks[-1], "index": -1}
        put_in_front(block, PatchedTimmBlock, merging=merging, **own)
    family.attach(encoder, merging)
    if is_segmenter(model):
        put_in_front(model, PatchedSegmenter, merging=merging)
    elif encoder is not model:
        model.__dict__["merging"] = merging
    return model


segmenter = timm = apply  # names of the first form


def _parts(model: Any) -> tuple[nn.Module, list[nn.Module]]:
    """The ViT of a model, and further blocks that see its tokens."""
    if is_segmenter(model):
        return model.encoder, list(model.decoder.blocks)
    return vit_within(model) or model, []


def _places(place: str, layers: tuple[int, ...], depth: int) -> dict[int, dict[str, int]]:
    """1-based block -> where in it a merge takes place, and the layer that the method calls it."""
    places: dict[int, dict[str, int]] = {}
    for layer in layers:
        block, where = (1, "before") if layer == 0 else (layer, place)
        block += where == "ahead"
        if block <= depth:
            places.setdefault(block, {})[where] = layer
    return places


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
    return resolve(method, Target(depth, tuple(grid)), options)[1]


def remove(model: Model) -> Model:
    """Undo `apply`, and `compile`: the model is exactly what it was before. Without them, nothing happens."""
    for module in model.modules():
        while isinstance(module, Patched):
            take_away(module)
        module.__dict__.pop("merging", None)  # of models that no class was put in front of
    return model


def is_patched(model: nn.Module) -> bool:
    """Whether `apply` was called."""
    return "merging" in vars(model)


def reduction(model: nn.Module) -> Reduction | None:
    """The composed `Reduction` of this thread's last forward pass, from all patches to the tokens that were left.

    Prefix tokens are left out. None if nothing was merged yet.

    Raises:
        ValueError: the model is not patched.
    """
    last = merging_of(model).last
    return None if last is None else last.reduction


def loss(model: nn.Module, labels: Tensor | None = None) -> Tensor | float:
    """What a learned method adds to the loss of this thread's last training pass; 0 for the others.

    Args:
        model: patched.
        labels: (B, H, W), of the images.

    Raises:
        ValueError: the model is not patched.
    """
    merging = merging_of(model)
    last, own = merging.last, merging.method.loss
    if own is None or last is None or not last.soft_steps:
        return 0.0
    encoder: Any = _parts(model)[0]
    blocks = family_of(encoder, check=False).blocks(encoder)
    sides = encoder.patch_embed.patch_size
    known = (last.grid, merging.prefix, last.options, labels, (int(sides[0]), int(sides[1])))
    return own(Trained(last.soft_steps, blocks, encoder.embed_dim, *known))


def method(model: nn.Module) -> str:
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
    merging.options = resolve(merging.method.name, merging.target, {**merging.options, "threshold": threshold})[1]


@contextmanager
def replaced_merge(model: nn.Module, merge: Callable[[Step], Reduction]) -> Iterator[None]:
    """While open, another function takes the place of the method's own: to record merges, or to replay them."""
    merging = merging_of(model)
    own = merging.method
    merging.method = replace(own, merge=merge)
    try:
        yield
    finally:
        merging.method = own


def merging_of(model: nn.Module) -> Merging:
    """What the patch put into a model.

    Raises:
        ValueError: the model is not patched.
    """
    if not is_patched(model):
        raise ValueError("the model is not patched: call patch.apply first")
    return vars(model)["merging"]
