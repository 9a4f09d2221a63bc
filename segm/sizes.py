"""Sizes of images and windows: one number for a square, or height and width."""

from collections.abc import Sequence

Size = int | Sequence[int]


def pair(size: Size) -> tuple[int, int]:
    """(height, width) of a size, pixels."""
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def short(size: Size) -> int | tuple[int, int]:
    """The size as it is written: a square as one number."""
    height, width = pair(size)
    return height if height == width else (height, width)


def scaled(size: Size, ratio: float) -> tuple[int, int]:
    """The size times a ratio, rounded as images are when they are resized; at least 1 pixel."""
    height, width = (max(int(side * ratio + 0.5), 1) for side in pair(size))
    return height, width


def smaller(size: Size, limit: Size) -> tuple[int, int]:
    """The size, no side longer than that of the limit."""
    height, width = map(min, pair(size), pair(limit))
    return height, width
