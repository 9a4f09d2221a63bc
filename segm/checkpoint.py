"""Checkpoints of a run directory: `checkpoint.pth` and `checkpoint_best.pth`, the format of Segmenter."""

import pickle
import zipfile
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from segm.errors import brief, one_line
from segm.files import atomic

LAST, BEST = "checkpoint.pth", "checkpoint_best.pth"
SHARED = "model.safetensors"  # weights alone, to be passed on
BEST_OF_G2TM = "best_checkpoint.pth"  # as its released code names it


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that a path means: the file itself, or of a run directory `checkpoint.pth`, or else
    `model.safetensors`, or else the best one alone (`checkpoint_best.pth`, G2TM's `best_checkpoint.pth`).

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    files = [path / name for name in (LAST, SHARED, BEST, BEST_OF_G2TM)] if path.is_dir() else [path]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no checkpoint {files[0]}: give a checkpoint file or a run directory with {LAST}")
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


def load_safetensors(file: Path) -> dict[str, Tensor]:
    """Named tensors, on the CPU.

    Raises:
        ValueError: the file is damaged or no safetensors file.
    """
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or no safetensors file ({one_line(error)})") from error


def load_tensors(file: Path) -> Any:
    """What `torch.save` wrote, on the CPU, executing nothing that it holds; checksums are verified.

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
            raise ValueError(f"{file} is damaged or no PyTorch checkpoint ({type(error).__name__})") from error
        raise ValueError(
            f"{file} holds objects that are not loaded for safety ({', '.join(objects)}): save its tensors alone, "
            "where you trust it, with torch.load(..., weights_only=False) and torch.save"
        ) from error
    except Exception as error:  # a damaged file fails in zip, pickle or torch, each with errors of its own
        reason = one_line(error) if isinstance(error, zipfile.BadZipFile) else type(error).__name__
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


@dataclass(frozen=True)
class Progress:
    """How far a training has come.

    Attributes:
        epoch: the one to go on with, counted from 0.
        updates: how many of its updates are done.
        updates_per_epoch: how many it has.
        losses: (processes, 2), float64: sum and number of the losses of these updates; None for none.
        best: highest mIoU so far, percent; -1: none.
    """

    epoch: int = 0
    updates: int = 0
    updates_per_epoch: int | None = None
    losses: Tensor | None = None
    best: float = -1.0


def training_state(
    model: nn.Module, optimizer: Optimizer, scheduler: Scheduler, scaler: torch.amp.GradScaler, progress: Progress
) -> dict[str, Any]:
    """Content of a checkpoint, from which `restore` goes on."""
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": scheduler.state_dict(),
        "loss_scaler": scaler.state_dict(),
        "epoch": progress.epoch - 1,  # the last one that is over
        "updates": progress.updates,
        "updates_per_epoch": progress.updates_per_epoch,
        "losses": progress.losses,
        "best_mean_iou": progress.best,
        "n_cls": model.n_cls,
    }


def restore(path: str | Path, model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> Progress:
    """Load the last checkpoint of a run into everything that learns.

    Raises:
        ValueError: the checkpoint was not written by a training like this one.
    """
    checkpoint = load_checkpoint(path)
    try:
        progress = Progress(
            _count(checkpoint, "epoch", from_=-1) + 1,
            _count(checkpoint, "updates") if "updates" in checkpoint else 0,
            checkpoint.get("updates_per_epoch"),
            checkpoint.get("losses"),
            checkpoint["best_mean_iou"],
        )
        if type(progress.best) not in (int, float) or not -1 <= progress.best <= 100:
            raise ValueError(f"its best mIoU is {brief(progress.best)}")
        if progress.updates:
            _check_losses(progress)
        model.load_state_dict(checkpoint["model"])
        _load_optimizer(optimizer, checkpoint["optimizer"])
        _load_scaler(scaler, checkpoint["loss_scaler"])
        return progress
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot resume {path} ({one_line(error)}): start a new run from it with --finetune"
        ) from error


def _count(checkpoint: dict[str, Any], key: str, from_: int = 0) -> int:
    value = checkpoint[key]
    if type(value) is not int or value < from_:
        raise ValueError(f"its {key} is {brief(value)}")
    return value


def _check_losses(progress: Progress) -> None:
    """The losses of the updates that an interrupted epoch counts are there."""
    losses = progress.losses
    if not isinstance(losses, Tensor) or losses.shape[1:] != (2,) or losses.dtype != torch.float64:
        raise ValueError("it has no losses of the updates that it counts")


def _load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Load what an optimizer keeps of its parameters; its settings are those of the run.

    PyTorch looks at neither before the next update.
    """
    own = optimizer.state_dict()["param_groups"]
    if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own]:
        raise ValueError("its optimizer has other parameters")
    optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
    probe = nn.Parameter(torch.zeros(1))
    probe.grad = torch.zeros(1)
    accepted = signature(type(optimizer)).parameters  # AdamW has defaults that it does not take
    fresh = type(optimizer)([probe], **{key: optimizer.defaults[key] for key in accepted if key in optimizer.defaults})
    fresh.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            _check_kept(optimizer.state.get(parameter, {}), fresh.state[probe], parameter)


def _check_kept(kept: dict[str, Any], wanted: dict[str, Any], parameter: Tensor) -> None:
    """What is kept of a parameter has the names of what an optimizer keeps, and its shape."""
    if kept and kept.keys() != wanted.keys():
        raise ValueError(f"its optimizer keeps {', '.join(map(str, kept))}, not {', '.join(wanted)}")
    for key, value in kept.items():
        shape = () if isinstance(wanted[key], Tensor) and wanted[key].ndim == 0 else parameter.shape
        fits = isinstance(value, Tensor) and value.shape == shape and value.is_floating_point()
        if not fits and not (value is None and wanted[key] is None):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"{key} of the optimizer is {found}, its parameter {tuple(parameter.shape)}")


def _load_scaler(scaler: torch.amp.GradScaler, saved: dict[str, Any]) -> None:
    """Load what a scaler has learned; it is empty where none is needed."""
    if not scaler.is_enabled():
        return
    if not (isinstance(saved["scale"], float) and 0 < saved["scale"] < float("inf")):
        raise ValueError(f"its loss scale is {brief(saved['scale'])}")
    _count(saved, "_growth_tracker")
    scaler.load_state_dict(scaler.state_dict() | {key: saved[key] for key in ("scale", "_growth_tracker")})
