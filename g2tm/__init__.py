"""Merging methods: pure functions from tokens to a `Reduction`. Knows no model, no file, no command line."""

from g2tm.attention import ATTENTION_MODES, attention_bias
from g2tm.clap import clap
from g2tm.dct import dct
from g2tm.dtem import embed, soft_merge, split
from g2tm.graph import edge_similarities, graph_merge
from g2tm.matching import ADAPTIVE, bipartite
from g2tm.mutual import mutual_pairs
from g2tm.reduction import Chain, Grouping, Reduction
from g2tm.statistics import mean_and_std, similarity_moments
from g2tm.tofu import prunes, tofu
from g2tm.validation import BATCH_MODES, budget, check_threshold, check_window

__all__ = [
    "ADAPTIVE",
    "ATTENTION_MODES",
    "BATCH_MODES",
    "Chain",
    "Grouping",
    "Reduction",
    "attention_bias",
    "bipartite",
    "budget",
    "check_threshold",
    "check_window",
    "clap",
    "dct",
    "edge_similarities",
    "embed",
    "graph_merge",
    "mean_and_std",
    "mutual_pairs",
    "prunes",
    "similarity_moments",
    "soft_merge",
    "split",
    "tofu",
]
