"""Writing files in one step: an interruption leaves the old file as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def part_of(file: Path) -> Path:
    """Where a file is written before it takes its place."""
    return file.with_name(f"{file.name}.part")


@contextmanager
def atomic(file: Path) -> Iterator[Path]:
    """A path to write to, which becomes `file` if the block ends well and disappears if not; folders are made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(file)
    try:
        yield part
        part.replace(file)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_text(file: Path, text: str) -> None:
    """Write a text, UTF-8, in one step."""
    with atomic(file) as part:
        part.write_text(text, encoding="utf-8")
