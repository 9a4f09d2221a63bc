"""Checks of arguments that the merging methods share; each raises a ValueError that says what is allowed."""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

BATCH_MODES = ("ragged", "uniform")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """One of some words."""
    if value not in choices:
        raise ValueError(f"{name} {value!r}: choose {', '.join(choices[:-1])} or {choices[-1]}")


def check_batch(batch: Any) -> None:
    """A way in which images of one batch share a tensor."""
    check_choice("batch mode", batch, BATCH_MODES)


def check_threshold(threshold: Any, name: str = "threshold") -> None:
    """A cosine similarity."""
    if not _is_within(threshold, -1, 1):
        raise ValueError(f"{name} {threshold!r}: give a cosine similarity from -1 to 1")


def check_share(value: Any, name: str) -> None:
    """A number from 0 to 1."""
    if not _is_within(value, 0, 1):
        raise ValueError(f"{name} {value!r}: give a number from 0 to 1")


def check_tokens(tokens: Any, lowest: int, highest: int, padding: Tensor | None = None) -> None:
    """A number of patch tokens that a merge can leave: from `lowest` to `highest`, in images without padding."""
    if padding is not None:
        raise ValueError(f"tokens {tokens!r}: a budget goes with images that have no padding; give another rule")
    if not _is_count(tokens) or not lowest <= tokens <= highest:
        raise ValueError(f"tokens {tokens!r}: this merge can leave {lowest} to {highest} patch tokens")


def budget(tokens: Any, n_patches: int) -> int:
    """Number of patch tokens that a budget allows, at least one.

    Args:
        tokens: how many, from 1 to n_patches (an int), or their share of the patches, above 0 and up to 1 (a float).
        n_patches: patches of an image.

    Raises:
        ValueError: neither of the two.
    """
    if _is_count(tokens) and tokens <= n_patches:
        return int(tokens)
    if isinstance(tokens, Real) and not isinstance(tokens, Integral) and 0 < float(tokens) <= 1:
        return max(round(float(tokens) * n_patches), 1)
    raise ValueError(f"tokens {tokens!r}: give a number from 1 to {n_patches} or a share of the patches such as 0.5")


def check_r(r: Any) -> None:
    """A number of tokens to remove."""
    if isinstance(r, bool) or not isinstance(r, Integral) or r < 0:
        raise ValueError(f"r {r!r}: give the number of tokens that a layer removes, 0 or more")


def check_grid(grid: tuple[int, int], n_tokens: int) -> None:
    """A grid of patches that holds all tokens."""
    gh, gw = grid
    if gh < 1 or gw < 1:
        raise ValueError(f"a grid of {gh}×{gw} patches is empty: give at least one row and one column")
    if gh * gw != n_tokens:
        raise ValueError(f"a grid of {gh}×{gw} patches does not hold {n_tokens} tokens: give patch tokens alone")


def check_window(window: Any, grid: tuple[int, int] | None = None) -> None:
    """A window of at least two patches, no larger than the grid."""
    if not isinstance(window, list | tuple) or len(window) != 2 or not all(_is_count(side) for side in window):
        raise ValueError(f"window {window}: give its height and width in patches, such as (2, 2)")
    if window[0] * window[1] < 2:
        raise ValueError("a window of one patch has nothing to merge: give at least two patches")
    if grid is not None and (window[0] > grid[0] or window[1] > grid[1]):
        raise ValueError(f"window {window[0]}×{window[1]} is larger than the grid of {grid[0]}×{grid[1]} patches")


def _is_within(value: Any, lowest: int, highest: int) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and lowest <= float(value) <= highest


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1
