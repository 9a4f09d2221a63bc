"""The command `g2tm`, which starts all others."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete
from click.testing import CliRunner

from g2tm.__main__ import COMMANDS, PREPARE, LazyCommand, main

ROOT = Path(__file__).parents[2]


def invoke(*words):
    return CliRunner().invoke(main, words, prog_name="g2tm")


def test_its_own_help_imports_no_torch():
    code = "import runpy, sys; sys.argv = ['g2tm', *sys.argv[1:]]\n"
    code += "try: runpy.run_module('g2tm', run_name='__main__')\nexcept SystemExit: print('torch' in sys.modules)"
    for words in (["--help"], ["--version"], ["prepare", "--help"]):
        run = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True, check=True)
        assert run.stdout.endswith("False\n"), run


def test_help_is_a_page_with_headings():
    lines = invoke("--help").output.splitlines()
    assert len(lines) <= 50 and {f"{heading}:" for heading in COMMANDS} <= {*lines}
    for command in main.commands.values():
        (line,) = (line for line in lines if line.startswith(f"  {command.name} "))
        assert line.endswith(command.get_short_help_str(100)), "a sentence takes one line"


def test_every_command_has_a_name():
    """`tune_threshold` is the released name of a part of `tune`. Of the checkout, which has scripts."""
    named = {command.where for command in main.commands.values() if isinstance(command, LazyCommand)}
    files = [file for file in sorted((ROOT / "segm").rglob("*.py")) if "@click.command" in file.read_text()]
    modules = {".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files}
    assert modules - {"segm.tune_threshold"} == {where for where in named if where.startswith("segm.")}
    prepared = {command.where for command in PREPARE.commands.values()}
    scripts = {f"scripts.{file.stem}" for file in (ROOT / "scripts").glob("prepare_*.py")}
    assert prepared == scripts - {"scripts.prepare_common"}


def test_a_command_is_called_by_its_name(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # that of scripts is put there
    for group, names in ((("g2tm",), main.commands), (("g2tm", "prepare"), PREPARE.commands)):
        for name, command in names.items():
            if isinstance(command, LazyCommand):
                result = invoke(*group[1:], name, "--help")
                assert result.exit_code == 0, (name, result.output)
                assert result.output.startswith(f"Usage: {' '.join(group)} {name} "), result.output


@pytest.mark.parametrize("words", [["nosuch"], ["test", "nowhere"], ["train"]])
def test_errors_are_one_line(words):
    result = invoke(*words)
    assert result.exit_code != 0 and len(result.stderr.splitlines()) == 1 and result.stderr.startswith("Error: ")
    assert words != ["nosuch"] or "choose from prepare, " in result.stderr


def test_words_are_completed():
    complete = BashComplete(main, {}, "g2tm", "_G2TM_COMPLETE")
    found = {item.value for item in complete.get_completions([], "t")}
    assert found == {"train", "test", "tune", "threshold", "tokens"}
    assert "--backbone" in [item.value for item in complete.get_completions(["train"], "--back")]
    assert complete.get_completions(["nosuch"], "") is not None


def test_the_version_is_that_of_the_project():
    """Stated in pyproject.toml alone; the changes begin with it."""
    version = invoke("--version").output.split()[-1]
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "CHANGELOG.md").read_text().startswith(f"# Changes\n\n## {version}\n")
    assert "\nversion:" not in (ROOT / "CITATION.cff").read_text()
