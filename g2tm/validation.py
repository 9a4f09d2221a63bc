"""Checks of arguments that the merging methods share; each raises a ValueError that says what is allowed."""

from numbers import Real

BATCH_MODES = ("ragged", "uniform")


def check_threshold(threshold, name="threshold"):
    """A cosine similarity."""
    if isinstance(threshold, bool) or not isinstance(threshold, Real) or not -1 <= threshold <= 1:
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


def check_window(window, grid=None):
    """A window of at least two patches, no larger than the grid."""
    if not isinstance(window, list | tuple) or len(window) != 2 or not all(_is_count(side) for side in window):
        raise ValueError(f"window {window}: give its height and width in patches, such as (2, 2)")
    if window[0] * window[1] < 2:
        raise ValueError("a window of one patch has nothing to merge: give at least two patches")
    if grid is not None and (window[0] > grid[0] or window[1] > grid[1]):
        raise ValueError(f"window {window[0]}×{window[1]} is larger than the grid of {grid[0]}×{grid[1]} patches")


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
