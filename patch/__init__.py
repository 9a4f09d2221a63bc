"""Puts a merging method of `g2tm` into a model's blocks and takes it out again. Knows blocks, not files.

patch.apply(model, "graph", layers=[2], threshold=0.88)
patch.reduction(model)   # of this thread's last forward pass
patch.compile(model)     # for inference
patch.remove(model)
"""

import patch.methods  # noqa: F401 - fills the registry
from g2tm import Reduction, mean_and_std
from patch.compiled import compile, is_compiled
from patch.curriculum import Curriculum
from patch.learned import add_modules, bound_parts, has_modules, has_resting_parts, learned_parameters
from patch.method import METHODS, Choice, Method, Number, Option, Step, Target, find, register
from patch.observe import edges, merge_ranges, reductions, similarities
from patch.patching import (
    apply,
    check,
    is_patched,
    loss,
    method,
    options,
    reduction,
    remove,
    replaced_merge,
    segmenter,
    set_threshold,
    timm,
)

__all__ = [
    "METHODS",
    "Choice",
    "Curriculum",
    "Method",
    "Number",
    "Option",
    "Reduction",
    "Step",
    "Target",
    "add_modules",
    "apply",
    "bound_parts",
    "check",
    "compile",
    "edges",
    "find",
    "has_modules",
    "has_resting_parts",
    "is_compiled",
    "is_patched",
    "learned_parameters",
    "loss",
    "mean_and_std",
    "merge_ranges",
    "method",
    "options",
    "reduction",
    "reductions",
    "register",
    "remove",
    "replaced_merge",
    "segmenter",
    "set_threshold",
    "similarities",
    "timm",
]
