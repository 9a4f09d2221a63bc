"""A training in a process of its own, which tests kill. Imported once by a server, from which each one is forked."""

import multiprocessing
import os
import sys

import segm.data.shapes
from segm import train

LENGTHS = {"train": 40, "val": 6}


def run(arguments: list[str], output: str, environment: dict[str, str]) -> None:
    """Train on few shapes; the exit status is that of the command, what it prints goes to a file."""
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # workers as in a training that a user starts
    segm.data.shapes.LENGTHS = LENGTHS
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.exit(train.main(arguments, standalone_mode=True))
