"""Evaluation: sliding windows, scores, and what a model costs."""
