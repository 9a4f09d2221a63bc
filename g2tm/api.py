"""All that `g2tm` offers by name."""

from g2tm.atc import LINKAGES, atc
from g2tm.attention import ATTENTION_MODES, attention_bias, cls_attention, received_attention
from g2tm.clap import clap, window_similarities
from g2tm.clustvit import Clusters, cluster_labels, clustering_loss
from g2tm.crossget import crossget
from g2tm.cubist import cubist, rectangle
from g2tm.dct import dct
from g2tm.diffrate import diffrate, diffrate_training, gigaflops, kept_tokens, rate_mask
from g2tm.dtem import embed, soft_merge, split
from g2tm.expedit import cluster_grid, expedit
from g2tm.fpet import fpet, fpet_training
from g2tm.graph import edge_similarities, graph_merge
from g2tm.ltmp import ltmp, ltmp_training, operations_left
from g2tm.masked import above, masked_softmax
from g2tm.matching import ADAPTIVE, bipartite
from g2tm.mctf import mctf
from g2tm.mpm import mutual_pairs
from g2tm.pitome import energy_margin, matches_all, pitome
from g2tm.random_merge import random_members, random_merge
from g2tm.reduction import Chain, Grouping, Reduction
from g2tm.soft import WEIGHTINGS, mix, nearest_weights
from g2tm.statistics import class_similarity_moments, mean_and_std, similarity_moments
from g2tm.tofu import prunes, tofu
from g2tm.validation import BATCH_MODES, budget, check_threshold, check_window

# The record of a step, the methods, and the numbers that models and training need beside them.
__all__ = ["Chain", "Grouping", "Reduction"]
__all__ += ["atc", "bipartite", "clap", "crossget", "cubist", "dct", "diffrate", "expedit", "fpet", "graph_merge"]
__all__ += ["ltmp", "mctf", "mutual_pairs", "pitome", "random_members", "random_merge", "tofu"]
__all__ += ["ADAPTIVE", "ATTENTION_MODES", "BATCH_MODES", "LINKAGES", "WEIGHTINGS"]
__all__ += ["attention_bias", "cls_attention", "edge_similarities", "mean_and_std", "received_attention"]
__all__ += ["budget", "check_threshold", "check_window"]
__all__ += ["class_similarity_moments", "similarity_moments", "window_similarities"]
__all__ += ["cluster_grid", "mix", "nearest_weights", "rectangle"]
__all__ += ["energy_margin", "matches_all", "prunes"]
__all__ += ["Clusters", "cluster_labels", "clustering_loss", "embed", "fpet_training", "soft_merge", "split"]
__all__ += ["diffrate_training", "gigaflops", "kept_tokens", "ltmp_training", "operations_left", "rate_mask"]
__all__ += ["above", "masked_softmax"]
