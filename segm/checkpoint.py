"""Run directories: `checkpoint.pth`, `checkpoint_best.pth` and `variant.yml`, the format of Segmenter."""

import logging
from pathlib import Path

import torch
import yaml

logger = logging.getLogger(__name__)

LAST, BEST, VARIANT = "checkpoint.pth", "checkpoint_best.pth", "variant.yml"


class _VariantLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also knows tuples: released files hold `!!python/tuple`, and no other tag."""


_VariantLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)


def checkpoint_file(path):
    """The checkpoint that a path means: the file itself, or `checkpoint.pth` of a run directory.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(path)
    file = path / LAST if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no checkpoint {file}: give a checkpoint file or a run directory with {LAST}")
    return file


def load_checkpoint(path):
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
    if not isinstance(checkpoint, dict) or "model" not in checkpoint:
        raise ValueError(f"{file} is no Segmenter checkpoint: it has no entry 'model'")
    return checkpoint


def save_checkpoint(checkpoint, file):
    """Write a checkpoint in one step: an interruption leaves the old file as it was."""
    file = Path(file)
    partial = file.with_name(file.name + ".part")
    torch.save(checkpoint, partial)
    partial.replace(file)


def copy_weights(model, path):
    """Copy the weights of another run into a model, to fine-tune it.

    What belongs to the classes keeps its initial values if the numbers of classes differ.

    Args:
        model: a Segmenter.
        path: checkpoint or run directory.

    Raises:
        ValueError: the architectures differ.
    """
    weights = load_checkpoint(path)["model"]
    own = model.state_dict()
    of_classes = {k for k in own if k.startswith(("decoder.cls_emb", "decoder.mask_norm", "decoder.head"))}
    if any(k in weights and weights[k].shape != own[k].shape for k in of_classes):
        logger.warning("%s has another number of classes: what belongs to the classes is learned anew", path)
        weights = weights | {k: own[k] for k in of_classes}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the requested model: {_one_line(error)}") from error


def restore(path, model, optimizer, scaler):
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
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"cannot resume {path} ({_one_line(error)}): start a new run from it with --finetune"
        ) from error


def _one_line(error):
    return " ".join(str(error).split())[:300]


def read_variant(path):
    """Read the `variant.yml` (or `variant.yaml`) beside a checkpoint or in a run directory.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: not valid YAML, a tag other than `!!python/tuple`, or no `net_kwargs` in it.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    candidates = [folder / name for name in (VARIANT, "variant.yaml")]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no {VARIANT} in {folder}: it belongs beside the checkpoint")
    try:
        variant = yaml.load(file.read_text(), Loader=_VariantLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a readable variant file: {' '.join(str(error).split())}") from error
    if not isinstance(variant, dict) or not isinstance(variant.get("net_kwargs"), dict):
        raise ValueError(f"{file} has no net_kwargs")
    return variant


def write_variant(variant, folder):
    """Write `variant.yml` into a run directory, in plain YAML."""
    text = yaml.safe_dump(variant, sort_keys=True)
    partial = Path(folder) / (VARIANT + ".part")
    partial.write_text(text)
    partial.replace(Path(folder) / VARIANT)
