"""Merging methods: pure functions from tokens to a `Reduction`. Knows no model, no file, no command line."""

from g2tm.attention import ATTENTION_MODES, attention_bias
from g2tm.graph import edge_similarities, graph_merge
from g2tm.matching import ADAPTIVE, bipartite
from g2tm.reduction import Reduction
from g2tm.statistics import mean_and_std, similarity_moments
from g2tm.validation import BATCH_MODES, check_threshold, check_window
from g2tm.windows import clap

__all__ = [
    "ADAPTIVE",
    "ATTENTION_MODES",
    "BATCH_MODES",
    "Reduction",
    "attention_bias",
    "bipartite",
    "check_threshold",
    "check_window",
    "clap",
    "edge_similarities",
    "graph_merge",
    "mean_and_std",
    "similarity_moments",
]
