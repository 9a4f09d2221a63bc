"""Puts a merging method of `g2tm` into a model's blocks and takes it out again. Knows blocks, not files.

patch.segmenter(model, "graph", layers=[2], threshold=0.88)
patch.reduction(model)   # of the last forward pass
patch.compile(model)     # for inference
patch.remove(model)
"""

import patch.methods  # noqa: F401 - fills the registry
from patch.apply import check, is_patched, method, reduction, remove, segmenter, set_threshold, settings, timm
from patch.compiled import compile, is_compiled
from patch.curriculum import Curriculum
from patch.observe import edges, mean_and_std, merge_ranges, reductions, similarities
from patch.registry import METHODS, Step, register

__all__ = [
    "METHODS",
    "Curriculum",
    "Step",
    "check",
    "compile",
    "edges",
    "is_compiled",
    "is_patched",
    "mean_and_std",
    "merge_ranges",
    "method",
    "reduction",
    "reductions",
    "register",
    "remove",
    "segmenter",
    "set_threshold",
    "settings",
    "similarities",
    "timm",
]
