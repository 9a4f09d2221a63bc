"""Random numbers that depend on given numbers alone, whatever process asks for them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np


def mix_seeds(*numbers: int) -> int:
    """One 64-bit seed from several non-negative numbers; order matters."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Seeds numpy's and Python's global generators, which mmcv's transforms use; restores them after."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    np.random.seed(np.random.SeedSequence(numbers).generate_state(4))
    random.seed(mix_seeds(*numbers))
    try:
        yield
    finally:
        np.random.set_state(numpy_state)
        random.setstate(python_state)
