"""Trainings of a study, each done once."""

import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click
import yaml

from segm.checkpoint import LAST, load_checkpoint

TRAIN = Path(__file__).resolve().parents[1] / "segm/train.py"


def train_unless_finished(
    folder: Path, options: Sequence[str], always: Sequence[str] = (), threads: int | None = None
) -> None:
    """Train with the real command, unless the folder holds the finished run; an interrupted one is resumed.

    Args:
        folder: the run directory.
        options: of train.py, for a new run; a resumed one has them recorded.
        always: further options, also when it is resumed.
        threads: of PyTorch; None: all.

    Raises:
        ValueError: the training failed.
    """
    if is_finished(folder):
        click.echo(f"{folder.name}: trained already, in {folder}; remove it to train anew")
        return
    chosen = ["--resume"] if (folder / LAST).exists() else options
    command = [str(TRAIN), "--log-dir", str(folder), *always, *chosen]
    click.echo(f"{folder.name}: python {shlex.join(command)}")
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    if subprocess.run([sys.executable, *command], env=environment).returncode:
        raise ValueError(f"the training in {folder} failed, see above")


def is_finished(folder: Path) -> bool:
    """Return whether a run directory holds all epochs."""
    if not (folder / LAST).exists():
        return False
    epochs = yaml.safe_load((folder / "variant.yml").read_text())["algorithm_kwargs"]["num_epochs"]
    return load_checkpoint(folder)["epoch"] + 1 >= epochs
