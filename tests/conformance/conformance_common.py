"""A file of conformance vectors, its cases, and how numbers are compared."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

STEP = 1e-5  # of single steps
MODEL = 1e-4  # of whole blocks and models, and of gradients


class Vectors(dict[str, Tensor]):
    """The tensors of a file by name.

    Args:
        file: a .safetensors file.

    Attributes:
        file: as given.
        header: of the file, text by name.
        parameters: case -> its parameters, where the header or a .json file of the same name has them.

    Raises:
        ValueError: the file cannot be read.
    """

    def __init__(self, file: Path) -> None:
        try:
            with safe_open(file, "pt") as opened:
                super().__init__({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
                self.header: dict[str, str] = opened.metadata() or {}
            beside = file.with_suffix(".json")
            cases = self.header.get("cases") or (beside.read_text() if beside.exists() else "{}")
            self.parameters: dict[str, Any] = json.loads(cases)
        except Exception as error:  # the library's own, of many kinds
            raise ValueError(f"{file} is no .safetensors file ({type(error).__name__})") from error
        self.file = file

    def below(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin so, without that prefix."""
        return {name.removeprefix(prefix): value for name, value in self.items() if name.startswith(prefix)}

    def numbers(self, name: str) -> list[int]:
        """The integers of an entry of the header; none where it is not there."""
        return [int(number) for number in re.findall(r"\d+", self.header.get(name, ""))]

    def lacks(self, name: str) -> "DoesNotHoldError":
        """The error of a file that does not tell a number which no shape of its tensors tells."""
        return DoesNotHoldError(f"the header of {self.file.name} lacks {name}")

    def sizes(self, name: str) -> Tensor:
        """(B, N, 1) -> (B, N)"""
        return self[name].squeeze(-1)


def with_cls(cls: Tensor | float, patches: Tensor) -> Tensor:
    """The whole sequence: patches, (B, N, ...), after CLS, the first of (B, L, ...) or a number."""
    first = cls[:, :1] if isinstance(cls, Tensor) else torch.full_like(patches[:, :1], cls)
    return torch.cat([first, patches], dim=1)


class DoesNotHoldError(Exception):
    """A computed result differs from the vectors."""


@dataclass(frozen=True)
class Case:
    """One case of a file.

    Attributes:
        family: as it is reported.
        name: of the case.
        check: raises a `DoesNotHoldError` if it does not hold.
    """

    family: str
    name: str
    check: Callable[[], None]


Cases = Iterator[Case]


def same(what: str, found: Tensor, expected: Tensor, tolerance: float = STEP, relative: bool = False) -> None:
    """Raise a `DoesNotHoldError` unless two tensors are equal up to a tolerance.

    relative: to the largest entry, or 1 if that is smaller.
    """
    found, expected = found.detach().float(), expected.float()
    if found.shape != expected.shape:
        raise DoesNotHoldError(f"{what} is {tuple(found.shape)}, not {tuple(expected.shape)}")
    allowed = tolerance * max(1.0, expected.abs().max().item()) if relative and expected.numel() else tolerance
    difference = (found - expected).abs().max().item() if found.numel() else 0.0
    if not difference <= allowed:
        raise DoesNotHoldError(f"{what} differs by {difference:.2g}, {allowed:.2g} is allowed")


def exactly(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise a `DoesNotHoldError` unless two assignments agree; -1 stands for a pruned token, which goes anywhere."""
    differing = int(((found != expected) & (expected >= 0)).sum())
    if found.shape != expected.shape or differing:
        raise DoesNotHoldError(f"{what} differs in {differing} places")


def same_partition(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise a `DoesNotHoldError` unless two assignments, (B, N), make the same groups, whatever their numbers."""
    for own, other in zip(found, expected, strict=True):
        pairs = torch.stack([own.long(), other.long()], 1).unique(dim=0)
        if not len(pairs) == len(own.unique()) == len(other.unique()):
            raise DoesNotHoldError(f"{what} makes other groups")
