"""Optimizers and learning-rate schedules, all of them timm's."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn
from torch.optim import Optimizer

OPTIMIZERS = ("sgd", "adamw")
SCHEDULERS = ("polynomial", "polynomial_epoch", "cosine")
MOMENTUM = 0.9
POWER = 0.9


def create_optimizer(model: nn.Module, name: str, learning_rate: float, weight_decay: float = 0.0) -> Optimizer:
    """Optimizer over the parameters that want a gradient; biases and norms are not decayed.

    Args:
        model: the unwrapped model.
        name: "sgd" (momentum 0.9, not Nesterov) or "adamw".

    Raises:
        ValueError: unknown name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}: choose {' or '.join(OPTIMIZERS)}")
    if name == "sgd":  # timm calls SGD without Nesterov "momentum"
        return create_optimizer_v2(model, "momentum", lr=learning_rate, weight_decay=weight_decay, momentum=MOMENTUM)
    return create_optimizer_v2(model, "adamw", lr=learning_rate, weight_decay=weight_decay)


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
) -> Scheduler:
    """Learning-rate schedule with a linear warm-up.

    lr(t) = (lr₀ - lr_min)·(1 - (t - w) / (T - w))^0.9 + lr_min after the w epochs of warm-up, which rise from
    start_factor·lr₀; t counts iterations ("polynomial": Segmenter, ALGM; "cosine") or epochs
    ("polynomial_epoch": G2TM).

    Returns:
        A timm scheduler: call `step_update(updates)` after every update and `step(epoch)` at every epoch.

    Raises:
        ValueError: unknown name, or a warm-up that leaves no epoch.
    """
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
    with _without_notice():
        if name == "cosine":
            return CosineLRScheduler(optimizer, **settings)
        return PolyLRScheduler(optimizer, power=POWER, **settings)


@contextmanager
def _without_notice() -> Iterator[None]:
    """timm says of a training of one update that its schedule has no effect; nobody expects one."""
    loggers = [logging.getLogger(f"timm.scheduler.{name}") for name in ("cosine_lr", "poly_lr")]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
