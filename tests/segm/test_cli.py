"""The command line that all commands share: values, errors, help."""

import importlib
import re
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner

import segm
from segm.cli import Command, Device, Listed, Numbers, repeat_option

ROOT = Path(segm.__file__).parent
FILES = [file for file in sorted(ROOT.rglob("*.py")) if "@click.command" in file.read_text(encoding="utf-8")]
COMMANDS = [".".join((segm.__name__, *file.relative_to(ROOT).with_suffix("").parts)) for file in FILES]
SENTENCE = re.compile(r"[A-Z].*\.(  \[[^]]+])*")


def test_open_ended_values():
    names = {"--layers": str.isdigit, "--kinds": ("a", "b").__contains__}
    for words, expected in (
        ("--layers 1 5 x", "--layers 1 --layers 5 x"),
        ("a --layers 1 --b 2", "a --layers 1 --b 2"),
        ("--layers", "--layers"),
        ("--layers=3 4", "--layers 3 --layers 4"),
        ("--kinds a b c --layers 1", "--kinds a --kinds b c --layers 1"),
        ("--kinds --layers 1 2", "--kinds --layers 1 --layers 2"),
    ):
        assert repeat_option(words.split(), names) == expected.split(), words


def test_numbers_take_negative_ones_and_words():
    command = Command("any", params=[Numbers(["--x"], words=("all",)), click.Argument(["rest"], required=False)])
    for words, x, rest in (("--x -1 2.5 all name", ("-1", "2.5", "all"), "name"), ("name", (), "name")):
        params = command.make_context("any", words.split()).params
        assert (tuple(params["x"]), params["rest"]) == (x, rest)


def test_values_are_read_or_refused_with_a_hint():
    sizes, names = Listed(int), Listed(str, lambda: ["T", "S"])
    for kind, text, value in (
        (sizes, "1, 8", (1, 8)),
        (names, "T,S", ("T", "S")),
        (Device(), "cpu", torch.device("cpu")),
    ):
        assert kind.convert(text, None, None) == value
    for kind, text, hint in (
        (sizes, "1,x", "commas"),
        (sizes, "0", "from 1"),
        (names, "T,X", "T, S"),
        (Device(), "cuda:99", "not available"),
        (Device(), "nosuch", "not available"),
    ):
        with pytest.raises(click.BadParameter, match=hint):
            kind.convert(text, None, None)


def test_errors_end_in_one_line():
    worker = (
        "Caught ValueError in DataLoader worker process 0.\nTraceback (most recent call last):\nValueError: label 7"
    )
    for error, line in (
        (ValueError("two\n lines"), "two lines"),
        (FileNotFoundError("no file a"), "no file a"),
        (ValueError(), "ValueError"),
        (ValueError(worker), "label 7"),
    ):

        @click.command(cls=Command)
        def main(error=error):
            raise error

        result = CliRunner().invoke(main)
        assert result.exit_code == 1 and result.stderr == f"Error: {line}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_sentence_and_a_default(name):
    command = importlib.import_module(name).main
    context = command.make_context(name, [], resilient_parsing=True)
    options = [one for one in command.get_params(context) if isinstance(one, click.Option) and not one.hidden]
    assert len(options) > 1
    for option in options:
        _, text = option.get_help_record(context)
        assert SENTENCE.fullmatch(text), (option.opts, text)
        assert "[default: " in text or option.is_flag or option.required, (option.opts, text)


def test_help_has_headings():
    options = [click.Option([f"--{name}"], help=f"The {name}.") for name in ("width", "rate", "out")]
    command = Command("any", params=options, groups={"Network": ["width"], "Training": ["rate"], "Empty": []})
    text = " ".join(CliRunner().invoke(command, ["--help"]).output.split())
    order = ("Options:", "--out", "--help", "Network:", "--width", "Training:", "--rate")
    places = [text.index(part) for part in order]
    assert places == sorted(places) and "Empty" not in text
