"""Pictures: merged tokens, attention, label maps, tables of pictures. Arrays in, images out; knows no model and no
file."""

from vis.attention import attention_map, attention_pictures, color_attention, overlay_attention, spread_weights
from vis.confusion import confusion_picture
from vis.curves import hull, scale_curves, search_plot, threshold_curves, tradeoff_plot
from vis.histograms import similarity_histograms, token_histograms
from vis.labels import blend, colorize, enlarge, label_picture, legend, magnification, mark
from vis.sheet import picture_sheet
from vis.similarity import class_similarity_curves, similarity_map
from vis.tokens import fill_tokens, outline_tokens, token_pictures

__all__ = [
    "attention_map",
    "attention_pictures",
    "blend",
    "class_similarity_curves",
    "color_attention",
    "colorize",
    "confusion_picture",
    "enlarge",
    "fill_tokens",
    "hull",
    "label_picture",
    "legend",
    "magnification",
    "mark",
    "outline_tokens",
    "overlay_attention",
    "picture_sheet",
    "scale_curves",
    "search_plot",
    "similarity_histograms",
    "similarity_map",
    "spread_weights",
    "threshold_curves",
    "token_histograms",
    "token_pictures",
    "tradeoff_plot",
]
