"""Faults in one line of bounded length."""

from typing import Any

LONGEST, BRIEF = 300, 80  # characters
TRAINING = "pip install 'g2tm[train]'"  # what labelled data sets, their heads, and training need besides


def one_line(error: BaseException | str, longest: int = LONGEST) -> str:
    """A message, often a library's, without line breaks."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 2] + " …"


def brief(value: Any) -> str:
    """A value as Python writes it, shortened."""
    return one_line(repr(value), BRIEF)
