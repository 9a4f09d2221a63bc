"""Merging methods: pure functions from tokens to a `Reduction`. Knows no model, no file, no command line."""

from g2tm.atc import LINKAGES, atc
from g2tm.attention import ATTENTION_MODES, attention_bias, attention_means, attention_row
from g2tm.chance import random_merge
from g2tm.clap import clap
from g2tm.clustvit import Clusters, cluster_labels, clustering_loss
from g2tm.crossget import crossget
from g2tm.dct import dct
from g2tm.diffrate import diffrate, diffrate_training, gigaflops, kept_tokens, rate_mask
from g2tm.dtem import embed, soft_merge, split
from g2tm.fpet import fpet, fpet_training
from g2tm.graph import edge_similarities, graph_merge
from g2tm.ltmp import ltmp, ltmp_training, operations_left
from g2tm.masked import above, masked_softmax
from g2tm.matching import ADAPTIVE, bipartite
from g2tm.mctf import mctf
from g2tm.mutual import mutual_pairs
from g2tm.pitome import energy_margin, matches_all, pitome
from g2tm.reduction import Chain, Grouping, Reduction
from g2tm.statistics import mean_and_std, similarity_moments
from g2tm.tofu import prunes, tofu
from g2tm.validation import BATCH_MODES, budget, check_threshold, check_window

__all__ = [
    "ADAPTIVE",
    "ATTENTION_MODES",
    "BATCH_MODES",
    "LINKAGES",
    "Chain",
    "Clusters",
    "Grouping",
    "Reduction",
    "above",
    "atc",
    "attention_bias",
    "attention_means",
    "attention_row",
    "bipartite",
    "budget",
    "check_threshold",
    "check_window",
    "clap",
    "cluster_labels",
    "clustering_loss",
    "crossget",
    "dct",
    "diffrate",
    "diffrate_training",
    "edge_similarities",
    "embed",
    "energy_margin",
    "fpet",
    "fpet_training",
    "gigaflops",
    "graph_merge",
    "kept_tokens",
    "ltmp",
    "ltmp_training",
    "masked_softmax",
    "matches_all",
    "mctf",
    "mean_and_std",
    "mutual_pairs",
    "operations_left",
    "pitome",
    "prunes",
    "random_merge",
    "rate_mask",
    "similarity_moments",
    "soft_merge",
    "split",
    "tofu",
]
