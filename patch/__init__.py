"""Puts a merging method of `g2tm` into a model's blocks and takes it out again. Knows blocks, not files.

patch.segmenter(model, "graph", layers=[2], threshold=0.88)
patch.reduction(model)   # of the last forward pass
patch.remove(model)
"""

from patch.apply import is_patched, reduction, remove, segmenter, set_threshold, settings
from patch.curriculum import Curriculum
from patch.registry import METHODS, Step, register

__all__ = [
    "METHODS",
    "Curriculum",
    "Step",
    "is_patched",
    "reduction",
    "register",
    "remove",
    "segmenter",
    "set_threshold",
    "settings",
]
