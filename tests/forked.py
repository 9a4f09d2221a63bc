"""Commands in processes of their own, which tests kill or let work together.

They are forked from a server that imports this file once: a process starts in milliseconds, an interpreter in seconds.
"""

import multiprocessing
import os
import socket
import sys
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

import segm.data.shapes
import segm.parallel
import segm.test
import segm.train

LENGTHS = {"train": 40, "val": 6}
HEAD_START = 1  # seconds in place of those that real processes may need


def _run(command: str, arguments: list[str], output: str, environment: dict[str, str]) -> None:
    """The exit status is that of the command; what it prints goes to the files that `printed` reads."""
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # workers as in a training that a user starts
    segm.data.shapes.LENGTHS, segm.parallel.MAIN_RANK_HEAD_START = LENGTHS, HEAD_START
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{suffix}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.exit(import_module(command).main(arguments, standalone_mode=True))


def printed(output: Path) -> tuple[str, str]:
    """What all processes with this output have printed so far: (stdout, stderr)."""
    return Path(f"{output}.out").read_text(), Path(f"{output}.err").read_text()


class Server:
    """Starts commands, and kills in the end what is left of them."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([__name__])  # found below the current directory
        self.processes: list[BaseProcess] = []

    def start(self, command: str, *arguments: object, output: Path, **environment: str) -> BaseProcess:
        """A command, such as `segm.train`, of few shapes; with these variables beside those of this process."""
        given = (command, list(map(str, arguments)), str(output), environment)
        process = self.context.Process(target=_run, args=given)
        process.start()
        self.processes.append(process)
        return process

    def together(self, n: int, command: str, *arguments: object, output: Path, **environment: str) -> list[BaseProcess]:
        """The same command in `n` processes that know each other, as `torchrun` starts them."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        common = environment | {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(n)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n)]
        return [self.start(command, *arguments, output=output, **common, **rank) for rank in ranks]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
