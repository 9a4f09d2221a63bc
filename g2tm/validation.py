"""Checks of arguments that the merging methods share; each raises a ValueError that says what is allowed."""

BATCH_MODES = ("ragged", "uniform")


def check_threshold(threshold, name="threshold"):
    """A cosine similarity."""
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not -1 <= threshold <= 1:
        raise ValueError(f"{name} {threshold!r}: give a cosine similarity from -1 to 1")


def check_batch(batch):
    """How images of one batch share a tensor."""
    if batch not in BATCH_MODES:
        raise ValueError(f"batch mode {batch!r}: choose {' or '.join(BATCH_MODES)}")


def check_grid(grid, n_tokens):
    """A grid of patches that holds all tokens."""
    gh, gw = grid
    if gh * gw != n_tokens:
        raise ValueError(f"a grid of {gh}×{gw} patches does not hold {n_tokens} tokens: give patch tokens alone")
