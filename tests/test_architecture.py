"""The arrows of the house: who may import whom."""

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("segm", "g2tm", "patch", "vis")
SOURCES = sorted(file for folder in OURS for file in (ROOT / folder).rglob("*.py"))


def imports(file):
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def is_command(file):
    """Files with a click command, and what they are built on."""
    shared = ("merging.py", "plan.py", "run.py", "eval/comparison.py")
    return "@click.command" in file.read_text() or file in [ROOT / "segm" / name for name in shared]


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_one_way(file):
    room = file.relative_to(ROOT).parts[0]
    used = {name.split(".")[0] for name in imports(file)} & set(OURS)
    allowed = {"g2tm": {"g2tm"}, "patch": {"patch", "g2tm"}, "vis": {"vis"}, "segm": {"segm"}}[room]
    if room == "segm" and is_command(file):
        allowed |= {"patch", "vis"}
    assert used <= allowed


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_only_readers_of_data_import_mmseg(file):
    if any(name.split(".")[0] in ("mmseg", "mmcv", "mmengine") for name in imports(file)):
        assert (ROOT / "segm/data") in file.parents


def test_commands_read_their_help_without_mmseg():
    commands = [file for file in sorted((ROOT / "segm").rglob("*.py")) if "@click.command" in file.read_text()]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in commands]
    assert {"segm.train", "segm.speedtest", "segm.eval.miou"} <= set(modules)
    code = f"import sys, {', '.join(modules)}; assert 'mmseg' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_segm_shadows_no_module():
    """`python segm/train.py` puts segm first on the path."""
    names = {file.stem for file in (ROOT / "segm").iterdir() if not file.name.startswith("__")} - {"test"}
    assert not names & (set(sys.stdlib_module_names) | set(packages_distributions()))


def test_libraries_do_not_print():
    for file in SOURCES:
        calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), file
