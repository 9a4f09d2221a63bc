"""Signals that ask a training to end: it finishes its step, saves, and leaves with a status other than 0."""

import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 2  # seconds within which signals are one: terminal and launcher may both pass it on


class SignalError(Exception):
    """A signal ended a training. Its message says where things stand; `status` is the exit status, 128 + signal."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Interruption:
    """Takes note of SIGTERM and Ctrl-C instead of dying of them.

    Attributes:
        status: what to leave with, 128 + the signal's number, as shells say it; 0: go on.
    """

    def __init__(self) -> None:
        self.status = 0

    def request(self, number: int = signal.SIGTERM) -> None:
        """Note a signal."""
        self.status = 128 + number

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While open, signals are noted. A second Ctrl-C ends the program at once, as it does without us."""
        if threading.current_thread() is not threading.main_thread():
            yield  # only a program's first thread may handle signals
            return
        before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        first = math.inf

        def note(number: int, _: FrameType | None) -> None:
            nonlocal first
            now = time.monotonic()
            if number == signal.SIGINT and now > first + SAME:
                raise KeyboardInterrupt
            first = min(first, now)
            self.request(number)

        for number in SIGNALS:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number in SIGNALS:
                signal.signal(number, before[number])
