"""Rows of measurements as Markdown."""


def markdown(columns, rows):
    """A table.

    Args:
        columns: title -> format string of the entries of a row, such as "{tokens:.0f}".
        rows: dicts.
    """
    lines = [[*columns], ["---"] * len(columns), *([text.format(**row) for text in columns.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
