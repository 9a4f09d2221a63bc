"""Puts a merging method of `g2tm` into a model's blocks and takes it out again. Knows blocks, not files.

patch.apply(model, "graph", layers=[2], threshold=0.88)
patch.reduction(model)   # of this thread's last forward pass
patch.compile(model)     # for inference
patch.remove(model)
"""

from g2tm import Reduction, class_similarity_moments, mean_and_std, window_similarities
from patch.attention import SoftMasking
from patch.compiled import compile, is_compiled
from patch.curriculum import Curriculum
from patch.exporting import onnx_options
from patch.learned import add_modules, clamp_parts, has_modules, has_unused_parts, learned_parameters
from patch.measure import benchmark
from patch.method import METHODS, Choice, LossInput, Method, ModelShape, Number, Option, Step, find, register
from patch.observe import edges, merge_ranges, reductions, similarities, tokens
from patch.patching import (
    apply,
    check,
    is_patched,
    loss,
    options,
    reduction,
    remove,
    replaced_merge,
    set_threshold,
)
from patch.patching import method_of as method

# isort: split
import patch.methods  # noqa: F401 - fills the registry; last, because the file of a method may import from here

__all__ = [
    "METHODS",
    "Choice",
    "Curriculum",
    "LossInput",
    "Method",
    "ModelShape",
    "Number",
    "Option",
    "Reduction",
    "SoftMasking",
    "Step",
    "add_modules",
    "apply",
    "benchmark",
    "check",
    "clamp_parts",
    "class_similarity_moments",
    "compile",
    "edges",
    "find",
    "has_modules",
    "has_unused_parts",
    "is_compiled",
    "is_patched",
    "learned_parameters",
    "loss",
    "mean_and_std",
    "merge_ranges",
    "method",
    "onnx_options",
    "options",
    "reduction",
    "reductions",
    "register",
    "remove",
    "replaced_merge",
    "set_threshold",
    "similarities",
    "tokens",
    "window_similarities",
]
