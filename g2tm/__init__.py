"""Merging methods: pure functions from tokens to a `Reduction`. Knows no model, no file, no command line."""

from g2tm.attention import ATTENTION_MODES, attention_bias
from g2tm.graph import edge_similarities, graph_merge
from g2tm.reduction import Reduction
from g2tm.validation import BATCH_MODES, check_threshold

__all__ = [
    "ATTENTION_MODES",
    "BATCH_MODES",
    "Reduction",
    "attention_bias",
    "check_threshold",
    "edge_similarities",
    "graph_merge",
]
