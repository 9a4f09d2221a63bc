"""Pictures: merged tokens, label maps, tables of pictures. Arrays in, images out; knows no model and no file."""

from vis.curves import threshold_curves
from vis.histograms import token_histograms
from vis.labels import blend, colorize, legend
from vis.sheet import picture_sheet
from vis.tokens import fill_tokens, outline_tokens

__all__ = [
    "blend",
    "colorize",
    "fill_tokens",
    "legend",
    "outline_tokens",
    "picture_sheet",
    "threshold_curves",
    "token_histograms",
]
