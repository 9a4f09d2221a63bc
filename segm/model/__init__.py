"""The Segmenter (Strudel et al., 2021) around timm's vision transformers."""
