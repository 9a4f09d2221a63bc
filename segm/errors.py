"""Faults in one line of bounded length."""

from pathlib import Path
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


def what_it_is(path: Path) -> str:
    """In words, what lies at a path in place of the file that was expected."""
    with path.open("rb") as file:
        start = file.read(200)
    if not start.strip():
        return "it is empty"
    if start.startswith(b"version https://git-lfs"):
        return "it is a pointer of Git LFS: fetch the file with git lfs pull"
    if start.lstrip()[:1] == b"<" and any(tag in start.lower() for tag in (b"<html", b"<!doctype", b"<head")):
        return "it is a web page, saved in place of the file: download the file itself"
    return f"it begins with {start[:8]!r}"
