"""Optimizers and learning-rate schedules, all of them timm's."""

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from segm.config import MOMENTUM, OPTIMIZERS, POWER, SCHEDULERS

if TYPE_CHECKING:
    from timm.scheduler.scheduler import Scheduler


def create_optimizer(
    model: nn.Module,
    name: str,
    learning_rate: float,
    weight_decay: float = 0.0,
    scale: Callable[[str, nn.Parameter], float] = lambda name, parameter: 1.0,
) -> Optimizer:
    """Optimizer over the parameters that want a gradient; biases and norms are not decayed.

    Args:
        name: "sgd" (momentum 0.9, not Nesterov) or "adamw".
        scale: from a parameter's name and itself to what its learning rate is multiplied by.

    Raises:
        ValueError: unknown name, or a model without anything to train.
    """
    from timm.optim import create_optimizer_v2, param_groups_weight_decay  # here, for timm is slow to import

    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: choose {' or '.join(OPTIMIZERS)}")
    names = {parameter: text for text, parameter in model.named_parameters()}
    undecayed: set[str] = getattr(model, "no_weight_decay", set)()
    groups = []
    for group in param_groups_weight_decay(model, weight_decay, no_weight_decay_list=undecayed):
        scaled: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            scaled.setdefault(scale(names[parameter], parameter), []).append(parameter)
        groups += [group | {"params": own, "lr_scale": factor} for factor, own in scaled.items()]
    if not groups:
        raise ValueError("the model has no parameter to train")
    # timm calls SGD without Nesterov "momentum".
    kind, more = ("momentum", {"momentum": MOMENTUM}) if name == "sgd" else ("adamw", {})
    return create_optimizer_v2(groups, kind, lr=learning_rate, weight_decay=weight_decay, **more)


def layer_scale(name: str, depth: int, encoder: float, decay: float) -> float:
    """Factor of a parameter's learning rate.

    With layer-wise decay, the last block of the encoder learns `decay` times as fast as the decoder, the one before
    decay² times, and so on down to the patch embedding, decay^(depth + 1).

    Args:
        name: of a parameter of a Segmenter.
        depth: number of blocks of the encoder.
        encoder: factor of all of the encoder.
        decay: from 0 to 1; 1: none.
    """
    part, *rest = name.split(".")
    if part != "encoder" or rest[0] == "queries":  # these are learned anew
        return 1.0
    if rest[0] == "blocks":
        return encoder * decay ** (depth - int(rest[1]))
    return encoder if rest[0] in ("norm", "fc_norm", "head") else encoder * decay ** (depth + 1)


def create_scheduler(
    optimizer: Optimizer,
    name: str,
    *,
    epochs: int,
    updates_per_epoch: int,
    min_lr: float = 1e-5,
    warmup_epochs: int = 0,
    start_factor: float = 1.0,
    learning_rate: float,
) -> "Scheduler":
    """Learning-rate schedule with a linear warm-up.

    lr(t) = (lr₀ - lr_min)·(1 - (t - w) / (T - w))^0.9 + lr_min after the w epochs of warm-up, which rise from
    start_factor·lr₀; t counts iterations ("polynomial": Segmenter, ALGM; "cosine") or epochs
    ("polynomial_epoch": G2TM).

    Returns:
        A timm scheduler: call `step_update(updates)` after every update and `step(epoch)` at every epoch.

    Raises:
        ValueError: unknown name, or a warm-up that leaves no epoch.
    """
    from timm.scheduler import CosineLRScheduler, PolyLRScheduler

    if name not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {name!r}: choose one of {', '.join(SCHEDULERS)}")
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"warm-up of {warmup_epochs} epochs: give fewer than the {epochs} epochs of the training")
    per_epoch = name == "polynomial_epoch"
    unit = 1 if per_epoch else updates_per_epoch
    settings: dict[str, Any] = {
        "t_initial": (epochs - warmup_epochs) * unit,
        "lr_min": min_lr,
        "warmup_t": warmup_epochs * unit,
        "warmup_lr_init": start_factor * learning_rate,
        "warmup_prefix": True,
        "t_in_epochs": per_epoch,
    }
    logger = logging.getLogger("timm.scheduler")  # it says of a training of one update that its schedule has no effect
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if name == "cosine":
            return CosineLRScheduler(optimizer, **settings)
        return PolyLRScheduler(optimizer, power=POWER, **settings)
    finally:
        logger.setLevel(level)
