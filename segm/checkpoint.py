"""Run directories: `checkpoint.pth`, `checkpoint_best.pth` and `variant.yml`, the format of Segmenter."""

from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.optim import Optimizer

from segm.errors import one_line
from segm.files import atomic, write_text

LAST, BEST, VARIANT = "checkpoint.pth", "checkpoint_best.pth", "variant.yml"
# What a model cannot be built or used with a text instead of: section -> keys of whole numbers, and of others.
NUMBERS = {
    "net_kwargs": {"n_cls", "image_size", "patch_size", "d_model", "n_heads", "n_layers"},
    "net_kwargs.decoder": {"n_cls", "n_layers"},
    "dataset_kwargs": {"image_size", "crop_size"},
    "inference_kwargs": {"im_size", "window_size", "window_stride"},
}
SHARES = {"net_kwargs": {"dropout", "drop_path_rate"}, "net_kwargs.decoder": {"dropout", "drop_path_rate"}}


class _VariantLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also knows tuples: released files hold `!!python/tuple`, and no other tag."""


_VariantLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)


def checkpoint_file(path: str | Path) -> Path:
    """The checkpoint that a path means: the file itself, or `checkpoint.pth` of a run directory.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    file = path / LAST if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {file}: give a checkpoint file or a run directory with {LAST}")
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
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails in zip, pickle or torch, each with errors of its own
        raise ValueError(f"{file} is damaged or no PyTorch checkpoint ({type(error).__name__})") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model"), dict):
        raise ValueError(f"{file} is no Segmenter checkpoint: it has no weights under 'model'")
    return checkpoint


def save_checkpoint(checkpoint: dict[str, Any], file: str | Path) -> None:
    """Write a checkpoint in one step."""
    with atomic(Path(file)) as part:
        torch.save(checkpoint, part)


def restore(
    path: str | Path, model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler
) -> tuple[int, float]:
    """Load the last checkpoint of a run into everything that learns.

    Returns:
        (epoch to go on with, counted from 0; best mIoU so far).

    Raises:
        ValueError: the checkpoint was not written by a training like this one.
    """
    checkpoint = load_checkpoint(path)
    try:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        scaler.load_state_dict(checkpoint["loss_scaler"])
        return checkpoint["epoch"] + 1, checkpoint["best_mean_iou"]
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"cannot resume {path} ({one_line(error)}): start a new run from it with --finetune"
        ) from error


def variant_file(path: str | Path) -> Path:
    """The `variant.yml` (or `variant.yaml`) beside a checkpoint or in a run directory.

    Raises:
        FileNotFoundError: neither is there.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    candidates = [folder / name for name in (VARIANT, "variant.yaml")]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no {VARIANT} in {folder}: it belongs beside the checkpoint")
    return file


def read_variant(path: str | Path) -> dict[str, Any]:
    """Read the `variant.yml` (or `variant.yaml`) beside a checkpoint or in a run directory.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: not valid YAML, a tag other than `!!python/tuple`, no `net_kwargs` in it, or a text where a number
            should be.
    """
    file = variant_file(path)
    try:
        variant = yaml.load(file.read_text(), Loader=_VariantLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a readable variant file: {one_line(error)}") from error
    if not isinstance(variant, dict) or not isinstance(variant.get("net_kwargs"), dict):
        raise ValueError(f"{file} has no net_kwargs")
    for section in ("dataset_kwargs", "inference_kwargs", "optimizer_kwargs", "algorithm_kwargs"):
        if not isinstance(variant.get(section, {}), dict):
            raise ValueError(f"{file}: {section} is no mapping")
    decoder = variant["net_kwargs"].get("decoder")
    sections = variant | {"net_kwargs.decoder": decoder if isinstance(decoder, dict) else {}}
    for name in NUMBERS:
        for key, value in sections.get(name, {}).items():
            if key in NUMBERS[name] and not _is_size(value):
                raise ValueError(f"{file}: {key} in {name} is {value!r}, it should be a whole number from 1")
            if key in SHARES.get(name, ()) and not (value is None or type(value) in (int, float)):
                raise ValueError(f"{file}: {key} in {name} is {value!r}, it should be a number from 0 to 1")
    return variant


def _is_size(value: Any) -> bool:
    """Whether a value is a positive whole number, several of them (sides of an image), or null."""
    values = value if isinstance(value, list | tuple) else [value]
    return all(one is None or (type(one) is int and one > 0) for one in values)


def write_variant(variant: dict[str, Any], folder: str | Path) -> None:
    """Write `variant.yml` into a run directory, in plain YAML."""
    write_text(Path(folder) / VARIANT, yaml.safe_dump(variant, sort_keys=True))
