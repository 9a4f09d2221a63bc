"""Segmenter: plain-ViT semantic segmentation, its training, evaluation and measuring."""
