"""All families; the first that knows a model takes it. `patch.families` imports this late: timm takes seconds."""

from patch.families.base import Family
from patch.families.mmseg_vit import MMSegViT
from patch.families.own_vit import OwnViT
from patch.families.timm_eva import TimmEva
from patch.families.timm_vit import TimmViT
from patch.families.transformers_dpt import TransformersDPT
from patch.families.transformers_vit import TransformersViT

FAMILIES: tuple[Family, ...] = (
    TimmViT(),
    TimmEva(),
    TransformersDPT(),
    TransformersViT(),
    MMSegViT(),
    OwnViT(),
)
