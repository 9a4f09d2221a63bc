"""Checkpoints of a run directory: `checkpoint.pth` and `checkpoint_best.pth`, the format of Segmenter."""

import hashlib
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from segm.errors import one_line, what_it_is
from segm.storage import atomic

LAST, BEST = "checkpoint.pth", "checkpoint_best.pth"
SHARED = "model.safetensors"  # weights alone, to be passed on
BEST_OF_G2TM = "best_checkpoint.pth"  # as its released code names it
CHOICES = {"last": (LAST,), "best": (BEST, BEST_OF_G2TM)}  # of a run directory, by name


def checkpoint_file(path: str | Path, which: str | None = None) -> Path:
    """The checkpoint that a path means: the file itself, or of a run directory `checkpoint.pth`, or else
    `model.safetensors`, or else the best one alone (`checkpoint_best.pth`, G2TM's `best_checkpoint.pth`).

    Args:
        path: file or run directory.
        which: "last" or "best" of a run directory, and no other.

    Raises:
        FileNotFoundError: there is none.
        ValueError: another word, or a choice where the path is a file already.
    """
    path = Path(path)
    if which is not None:
        return _chosen(path, which)
    files = [path / name for name in (LAST, SHARED, BEST, BEST_OF_G2TM)] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no checkpoint {files[0]}: give a checkpoint file or a run directory with {LAST}")
    return file


def _chosen(path: Path, which: str) -> Path:
    if which not in CHOICES:
        raise ValueError(f"checkpoint is {which!r}: choose one of {', '.join(CHOICES)}")
    if path.is_file():
        raise ValueError(f"{path} is one checkpoint: leave out {which!r}, or give its run directory")
    file = next((path / name for name in CHOICES[which] if (path / name).is_file()), None)
    if file is None:
        there = ", ".join(name for name in (LAST, SHARED, BEST, BEST_OF_G2TM) if (path / name).is_file())
        raise FileNotFoundError(f"no {which} checkpoint {path / CHOICES[which][0]}: {path} holds {there or 'none'}")
    return file


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, on the CPU, executing nothing that it holds.

    Returns:
        A dict with at least `model`, a state dict.

    Raises:
        FileNotFoundError: there is none.
        ValueError: the file is damaged or no checkpoint.
    """
    file = checkpoint_file(path)
    checkpoint = {"model": load_safetensors(file)} if file.suffix == ".safetensors" else load_tensors(file)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{file} is no Segmenter checkpoint: it has no weights under 'model'")
    return checkpoint


def weights_digest(weights: Mapping[str, Tensor]) -> str:
    """A hash of names, shapes and values of weights, the same in all formats of files: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        plain = value.detach().cpu()
        plain = plain.float() if plain.is_floating_point() else plain  # as a model holds it
        digest.update(f"{name} {tuple(plain.shape)} {plain.dtype} ".encode())
        digest.update(plain.reshape(-1).numpy().tobytes())
    return digest.hexdigest()[:16]


def load_safetensors(file: Path) -> dict[str, Tensor]:
    """Named tensors, on the CPU; a ValueError if the file is damaged or no safetensors file."""
    try:
        return load_file(file)
    except SafetensorError as error:
        reason = f"{one_line(error)}; {what_it_is(file)}"
        raise ValueError(f"{file} is damaged or no safetensors file ({reason})") from error


def load_tensors(file: Path) -> Any:
    """Read what `torch.save` wrote, on the CPU, executing nothing that it holds; checksums are verified.

    Raises:
        ValueError: the file is damaged or was not written by `torch.save`.
    """
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # PyTorch writes checksums, but does not read them
            if damaged is not None:
                raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        objects = _unsafe_objects(file)
        if not objects:
            raise ValueError(f"{file} is damaged or no PyTorch checkpoint ({what_it_is(file)})") from error
        raise ValueError(
            f"{file} holds objects that are not loaded for safety ({', '.join(objects)}): save its tensors alone, "
            "where you trust it, with torch.load(..., weights_only=False) and torch.save"
        ) from error
    except Exception as error:  # a damaged file fails in zip, pickle or torch, each with errors of its own
        reason = one_line(error) if isinstance(error, zipfile.BadZipFile) else what_it_is(file)
        raise ValueError(f"{file} is damaged or no PyTorch checkpoint ({reason})") from error


def _unsafe_objects(file: Path) -> list[str]:
    """Names of the first few classes in a checkpoint that PyTorch does not load unasked."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file))[:5]
    except Exception:  # a damaged file
        return []


def save_checkpoint(checkpoint: dict[str, Any], file: str | Path) -> None:
    """Write a checkpoint in one step.

    Raises:
        OSError: the disk is full; the old file stays.
    """
    with atomic(Path(file)) as part, part.open("wb") as stream:
        torch.save(checkpoint, stream)
