"""What EoMT is trained with: the loss of transformers, with one mask per class of an image."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from segm.data.dataset import IGNORE_LABEL
from segm.model.masks import Prediction


def eomt_loss(predictions: Sequence[Prediction], labels: Tensor) -> Tensor:
    """The sum over the predictions behind every block that queries are in; each is matched by itself.

    Args:
        predictions: from `Segmenter.training_outputs`.
        labels: (B, H, W), int64; pixels of 255 are in no mask.

    Raises:
        ValueError: transformers is not installed.
    """
    n_cls = predictions[0].classes.shape[-1] - 1
    classes = [found[found != IGNORE_LABEL] for found in (image.unique() for image in labels)]
    masks = [(image == found[:, None, None]).float() for image, found in zip(labels, classes, strict=True)]
    if not any(map(len, classes)):  # nothing to match
        return sum((0.0 * (one.classes.sum() + one.masks.sum()) for one in predictions), labels.new_zeros(()).float())
    criterion = _criterion(n_cls, labels[0].numel()).to(labels.device)
    total = labels.new_zeros((), dtype=torch.float32)
    for found in predictions:
        parts = criterion(found.masks.float(), found.classes.float(), masks, classes)
        total = total + sum(criterion.weight_dict[name] * value for name, value in parts.items())
    return total


@cache
def _criterion(n_cls: int, n_pixels: int) -> Any:
    """The loss is taken at points of the masks: as many as published, but no more than an image has pixels."""
    try:
        from transformers.models.eomt.configuration_eomt import EomtConfig
        from transformers.models.eomt.modeling_eomt import EomtLoss
    except ImportError:
        raise ValueError("the loss of eomt is that of transformers: pip install transformers") from None
    config: Any = EomtConfig()
    config.num_labels, config.train_num_points = n_cls, min(config.train_num_points, n_pixels)
    weights = {"loss_cross_entropy": config.class_weight, "loss_mask": config.mask_weight}
    return EomtLoss(config, weights | {"loss_dice": config.dice_weight})
