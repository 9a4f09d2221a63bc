"""What the tests of several folders share and no fixture can give."""

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import patch
from segm.eval.sliding import sliding_logits

READING = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__bool__, torch.Tensor.__int__, torch.Tensor.__float__)
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "bincount", "is_nonzero")

# Options with which every method merges something in a network of three layers with random weights.
METHOD_OPTIONS = {
    "graph": {"threshold": 0.2},
    "algm": {"layers": [1, 3], "threshold": 0.1},
    "tome": {"r": 2},
    "tofu": {"r": 2},
    "dct": {"r": 2},
    "dtem": {"r": 2},
    "mpm": {"layers": [2, 3]},
    "random": {},
    "pitome": {"r": 2},
    "mctf": {"r": 2},
    "crossget": {"r": 2},
    "atc": {"layers": [2, 3]},
    "diffrate": {"prune_kept": [16, 14, 12], "merge_kept": [15, 12, 10]},
    "ltmp": {"merge_threshold": 0.1, "prune_threshold": 0.03},
    "fpet": {},
    "clustvit": {"layers": [2]},
    "expedit": {},
    "cubist": {"remove": (1, 2)},
    "keymatch": {"layers": [2, 3], "tokens": [0.8, 0.5]},
}
RAGGED = (
    "graph",
    "algm",
    "mpm",
    "ltmp",
    "clustvit",
)  # of these, the methods whose images keep different numbers of tokens

# Every method whose number of tokens does not depend on the image, and options that make it so.
STATIC_OPTIONS = {name: METHOD_OPTIONS[name] for name in METHOD_OPTIONS if patch.find(name).static} | {
    "graph": {"tokens": 7},
    "algm": {"layers": [1, 3], "tokens": [9, 6]},
    "ltmp": {"tokens": [13, 10, 7]},
}


def read_variant(folder):
    """What stands in the `variant.yml` of a run directory."""
    return yaml.safe_load(Path(folder, "variant.yml").read_text(encoding="utf-8"))


def write_variant(variant, folder):
    """Write a `variant.yml` as it is given."""
    Path(folder, "variant.yml").write_text(yaml.safe_dump(variant), encoding="utf-8")


def options_for(method, **options):
    """Its options, and more: a method that counts every token as one takes no attention mode."""
    if method == "clustvit":
        options.pop("attention", None)
    return METHOD_OPTIONS[method] | options


def different_images(n=3, side=32):
    """(n, 3, side, side), from faint to strong, so that they keep different numbers of tokens."""
    return torch.randn(n, 3, side, side) * torch.logspace(-1, 0.5, n).view(n, 1, 1, 1)


class Reads(TorchFunctionMode):
    """Counts what turns a tensor into numbers.

    `numpy()` is left out: only branches for tensors on the CPU take it, where there is nothing to wait for.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function in READING
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts operations inside of torch that a CUDA device would have to finish its queue for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        self.count += by_mask or name in WAITING
        return function(*args, **(kwargs or {}))


class Copies(TorchDispatchMode):
    """Counts operations of several devices: copies from one to the other, and whatever mixes them.

    Numbers without dimensions do not count: PyTorch hands them over with the kernel.
    """

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        copies = name in ("_to_copy", "copy_")
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and (x.ndim or copies)]
        if len({x.device.type for x in tensors}) > 1:
            self.names.append(name)
        return out


def by_speed(cases, quick=(), slow=()):
    """The cases as parameters of a test: `quick` ones run always, `slow` ones in `make test`, all others at night."""
    cases = list(cases)
    assert {*quick, *slow} <= {*cases}, {*quick, *slow} - {*cases}

    def marks(case):
        return () if case in quick else pytest.mark.slow if case in slow else pytest.mark.nightly

    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks(case)) for case in cases]


FEW = ("graph", "algm", "tome", "ltmp")  # by threshold, in two places, in every layer, and with pruning


def few_and_all(names=tuple(METHOD_OPTIONS)):
    """Parameters of a test that goes through methods: a few that stand for all, and all of them at night."""
    few = [name for name in FEW if name in names]
    return [pytest.param(few, id="few"), pytest.param([*names], id="all", marks=pytest.mark.nightly)]


def run_here(words, **_):
    """In place of `subprocess.run`: Python with a command of ours, such as segm/train.py, called in this process."""
    _, file, *arguments = words
    module = Path(file).resolve().relative_to(Path(__file__).parents[1]).with_suffix("")
    command = importlib.import_module(".".join(module.parts)).main
    result = CliRunner().invoke(command, arguments)
    return subprocess.CompletedProcess(words, result.exit_code, result.stdout, result.stderr)


def end_process(*_, **__):
    """Ends the process at once, as a fault in a compiled library does."""
    os.abort()


def with_parts(encoder, method):
    """An encoder with the learned parts that a method cannot do without."""
    return encoder if patch.find(method).enabled_by else patch.add_modules(encoder, method)


def view_logits(model, image, flipped, windows, size):
    """Logits of one view of an image, all at once, at the image's original size: (C, height, width)."""
    return sliding_logits(model, image, flipped, windows, size).part(slice(None), slice(None)).permute(2, 0, 1)


def right_or_refused(action, expected, match=".", **tolerance):
    """Run something that either gives what is expected, or a ValueError of one sentence that matches.

    Returns True where it was refused.
    """
    try:
        found = action()
    except ValueError as error:
        assert re.search(match, str(error)), error
        assert "\n" not in str(error) and len(str(error).split()) > 5, error
        return True
    torch.testing.assert_close(found, expected, **{"atol": 1e-5, "rtol": 1e-5} | tolerance)
    return False
