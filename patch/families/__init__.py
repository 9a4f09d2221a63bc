"""The kinds of ViT and the ways to take them apart: one file per kind."""

from torch import nn

from patch.families.base import Family
from patch.families.segmenter import is_segmenter


def family_of(model: nn.Module) -> Family:
    """The family that knows a ViT.

    Raises:
        ValueError: none does.
    """
    family = _family(model)
    if family is None:
        from patch.families.own_vit import has_blocks  # here: it imports timm

        if has_blocks(model):
            raise ValueError(
                f"cannot patch a {type(model).__name__}: its blocks are timm's, but it lacks a patch_embed, a timm "
                "PatchEmbed that embeds its images"
            )
        known = ", ".join(family.name for family in _families())
        raise ValueError(f"cannot patch a {type(model).__name__}: known are a Segmenter and {known}")
    return family


def models_within(model: nn.Module) -> dict[str, nn.Module]:
    """Path -> the Segmenters that a model is or holds, and the ViTs outside of them. Wrappers are looked through."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(not outer or name.startswith(f"{outer}.") for outer in found)
        if not inside and (is_segmenter(module) or _family(module) is not None):
            found[name] = module
    return found


def _family(model: nn.Module) -> Family | None:
    return next((family for family in _families() if family.knows(model)), None)


def _families() -> tuple[Family, ...]:
    from patch.families import known  # not above: it imports timm

    return known.FAMILIES
