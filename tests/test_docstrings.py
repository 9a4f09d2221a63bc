"""Docstrings of the libraries say what something is: none opens with a free relative clause."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("g2tm", "patch", "segm", "vis", "scripts")
OPENINGS = {"what", "whatever", "whether", "how", "however", "where", "wherever", "when", "whenever", "why"}
OPENINGS |= {"who", "whoever", "whom", "whose", "which", "whichever"}


def docstrings(path):
    """(line, docstring) of a module, its classes and functions, and of attributes that have one."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        for one in getattr(node, "body", []) if isinstance(getattr(node, "body", None), list) else []:
            if isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant) and isinstance(one.value.value, str):
                yield one.lineno, one.value.value


def opening(text):
    words = text.strip().split()
    return words[0].strip(",.:;").lower() if words else ""


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_docstring_opens_with_a_free_relative_clause(folder):
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text.strip().splitlines()[0]}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line, text in docstrings(path)
        if opening(text) in OPENINGS
    ]
    assert not found, "\n".join(found)


def test_the_check_finds_what_it_looks_for(tmp_path):
    file = tmp_path / "one.py"
    file.write_text(
        '"""A module."""\n\ndef f():\n    """Whether it is."""\n\nclass A:\n    """What is."""\n\n    x = 1\n'
    )
    assert [opening(text) in OPENINGS for _, text in docstrings(file)] == [False, True, True]
