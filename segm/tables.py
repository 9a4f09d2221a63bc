"""Rows of measurements as Markdown."""

from collections.abc import Iterable, Mapping
from typing import Any


def markdown(columns: Mapping[str, str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table.

    Args:
        columns: title -> format string of the entries of a row, such as "{tokens:.0f}".
        rows: one mapping per row.
    """
    cells = ([text.format(**row).replace("|", r"\|") for text in columns.values()] for row in rows)
    lines = [[*columns], ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
