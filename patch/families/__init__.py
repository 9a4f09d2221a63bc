"""How each kind of ViT is taken apart: one file per kind."""

from torch import nn

from patch.families.base import Family
from patch.families.mmseg_vit import MMSegViT
from patch.families.timm_eva import TimmEva
from patch.families.timm_vit import TimmViT
from patch.families.transformers_vit import TransformersViT

FAMILIES: tuple[Family, ...] = (TimmViT(), TimmEva(), TransformersViT(), MMSegViT())


def vit_within(model: nn.Module) -> nn.Module | None:
    """The first ViT that a model is or holds; None: none that is known."""
    return next((one for one in model.modules() if any(family.knows(one) for family in FAMILIES)), None)


def family_of(model: nn.Module, check: bool = True) -> Family:
    """The family that knows a ViT.

    Args:
        check: whether it is to be patched; not for one that is patched already.

    Raises:
        ValueError: none does, or the model is of a known kind but has a part that cannot be patched.
    """
    family = next((family for family in FAMILIES if family.knows(model)), None)
    if family is None:
        known = ", ".join(family.name for family in FAMILIES)
        raise ValueError(f"cannot patch a {type(model).__name__}: known are a Segmenter and {known}")
    if check:
        family.check(model)
    return family
