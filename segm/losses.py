"""Losses of a Segmenter: cross-entropy, and the losses of decoders that predict masks."""

from collections.abc import Callable, Collection, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segm import parallel
from segm.data.dataset import ignore_label
from segm.model.masks import EoMT, Prediction, SegViT
from segm.model.segmenter import Segmenter
from segm.model.upsample import upsample

ABSENT_WEIGHT = 0.1  # of the class "not in this image"
FOCAL_WEIGHT, FOCAL_GAMMA = 20.0, 2.0


def segmentation_loss(
    logits: Tensor,
    labels: Tensor,
    n_labelled: Tensor | None = None,
    share: float = 1.0,
    *,
    parts: Collection[str] = ("cross_entropy",),
    weight: Tensor | None = None,
) -> Tensor:
    """The sum of some losses; a batch without labelled pixels gives 0 instead of NaN.

    Cross-entropy and focal loss are means over the labelled pixels, Dice is one over images. With several processes,
    the mean of their losses is that over the pixels and images of all.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W), int64; what is no class is ignored.
        n_labelled: (), the labelled pixels of all processes and parts of a batch; None: they are counted.
        share: of the images of the batch that these are.
        parts: one or several of `segm.config.LOSSES`.
        weight: (C,), what the loss of a pixel is multiplied by, by its class; None: 1.
    """
    logits, ignored = logits.float(), ignore_label(logits.shape[1])
    if n_labelled is None:
        n_labelled = parallel.all_reduce_sum((labels != ignored).sum())
    total = logits.new_zeros(())
    if "cross_entropy" in parts:
        total = total + F.cross_entropy(logits, labels, weight, ignore_index=ignored, reduction="sum")
    if "focal" in parts:
        total = total + _focal(logits, labels, ignored, weight)
    total = total * parallel.world_size() / n_labelled.clamp(min=1)
    return total + share * _dice(logits, labels).mean() if "dice" in parts else total


def _focal(logits: Tensor, labels: Tensor, ignored: int, weight: Tensor | None) -> Tensor:
    """(1 - p)^γ · cross-entropy with γ = 2, summed over pixels; p: softmax of the true class (Lin et al., 2017).

    That of mmsegmentation wants compiled operators, and without them takes one class alone.
    """
    one = F.cross_entropy(logits, labels, ignore_index=ignored, reduction="none")
    one = (1 - (-one).exp()) ** FOCAL_GAMMA * one
    return (one if weight is None else one * weight[labels.where(labels != ignored, 0)]).sum()


def _dice(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - Dice coefficient of every image, its mean over the classes in it (Milletari et al., 2016): (B,).

    That of mmsegmentation counts what is predicted where nothing is labelled. No one-hot masks are made.
    """
    n_cls = logits.shape[1]
    labelled = (labels < n_cls).flatten(1)
    index = labels.flatten(1).where(labelled, 0)
    probability = logits.softmax(1).flatten(2) * labelled.unsqueeze(1)
    true = probability.gather(1, index.unsqueeze(1))[:, 0]  # (B, H·W), 0 where nothing is labelled
    zeros = true.new_zeros(len(logits), n_cls)
    overlap, size = zeros.scatter_add(1, index, true), zeros.scatter_add(1, index, labelled.to(true))
    present = size > 0
    dice = 2 * overlap / (probability.sum(2) + size).where(present, 1)
    return ((1 - dice) * present).sum(1) / present.sum(1).clamp(min=1)


def balanced_weights(pixels: Sequence[int]) -> list[float]:
    """Weights of classes by median frequency balancing: median frequency / frequency (Eigen and Fergus, 2015).

    The frequency is the share of all labelled pixels that were counted, where the publication takes those of the images
    with the class. A class without a pixel gets the highest weight of the others.

    Args:
        pixels: of every class.

    Raises:
        ValueError: there is no pixel.
    """
    counts = torch.tensor(pixels, dtype=torch.float64)
    if not counts.any():
        raise ValueError("--class-weights auto: no pixel was counted; name a file with the weights")
    weights = counts[counts > 0].quantile(0.5) / counts
    return weights.where(counts > 0, weights[counts > 0].max()).tolist()


def segvit_loss(stages: Sequence[Prediction], labels: Tensor) -> Tensor:
    """The sum over the stages of `SegViT`: which classes are in an image, and where (SegViT, section 3.3).

    Query c belongs to class c, so nothing is matched. labels: (B, H, W), int64; pixels of no class are left out.
    """
    n_cls = stages[0].masks.shape[1]
    labeled = labels < n_cls
    one_hot = F.one_hot(labels.where(labeled, n_cls), n_cls + 1)[..., :-1].permute(0, 3, 1, 2)
    present = one_hot.flatten(2).any(-1)
    image, query = present.nonzero(as_tuple=True)
    targets = torch.arange(n_cls, device=labels.device).where(present, n_cls)
    weight = torch.ones(n_cls + 1, device=labels.device)
    weight[-1] = ABSENT_WEIGHT
    masks, where = one_hot[image, query].float(), labeled[image].float()
    total = stages[0].classes.new_zeros((), dtype=torch.float32)
    for stage in stages:
        total = total + F.cross_entropy(stage.classes.float().transpose(1, 2), targets, weight)
        logits = upsample(stage.masks[image, query].float().unsqueeze(1), labels.shape[1:])[:, 0]
        total = total + _mask_loss(logits, masks, where) / max(len(image), 1)
    return total


def _mask_loss(logits: Tensor, masks: Tensor, where: Tensor) -> Tensor:
    """Focal and dice loss, summed up over masks: logits, masks and which pixels count, (M, H, W) each."""
    from torchvision.ops import sigmoid_focal_loss  # here, for it is slow to import

    focal = sigmoid_focal_loss(logits, masks, alpha=0.25, gamma=2) * where
    focal = focal.flatten(1).sum(1) / where.flatten(1).sum(1).clamp(min=1)
    probability = logits.sigmoid() * where
    overlap, both = (probability * masks).flatten(1).sum(1), (probability + masks).flatten(1).sum(1)
    dice = 1 - (2 * overlap + 1) / (both + 1)
    return (FOCAL_WEIGHT * focal + dice).sum()


def eomt_loss(predictions: Sequence[Prediction], labels: Tensor) -> Tensor:
    """The loss of transformers' EoMT, summed over the predictions of `Segmenter.training_outputs`.

    Each is matched by itself, with one mask per class of an image. labels: (B, H, W), int64; no mask has pixels of no
    class.

    Raises:
        ValueError: transformers is not installed.
    """
    n_cls = predictions[0].classes.shape[-1] - 1
    classes = [found[found < n_cls] for found in (image.unique() for image in labels)]
    masks = [(image == found[:, None, None]).float() for image, found in zip(labels, classes, strict=True)]
    if not any(map(len, classes)):  # nothing to match
        return sum((0.0 * (one.classes.sum() + one.masks.sum()) for one in predictions), labels.new_zeros(()).float())
    criterion = _eomt_criterion(n_cls, labels[0].numel()).to(labels.device)
    total = labels.new_zeros((), dtype=torch.float32)
    for found in predictions:
        parts = criterion(found.masks.float(), found.classes.float(), masks, classes)
        total = total + sum(criterion.weight_dict[name] * value for name, value in parts.items())
    return total


@cache
def _eomt_criterion(n_cls: int, n_pixels: int) -> Any:
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


# Losses of decoders that learn from more than logits.
DECODER_LOSSES: dict[type, Callable[[Any, Tensor], Tensor]] = {SegViT: segvit_loss, EoMT: eomt_loss}
AUXILIARY_WEIGHT = 0.4  # of an auxiliary head in the loss (PSPNet, section 4; SETR)


class Objective(nn.Module):
    """A model with its loss, as one module that `DistributedDataParallel` wraps.

    Args:
        model: a Segmenter, whose parameters it shares.
        outputs: from images to logits (B, C, H, W) or what the decoder's own loss takes, then the logits of auxiliary
            heads; None: `Segmenter.training_outputs`.
        method_loss: from labels to what a merging method adds to the loss, a tensor or 0.0; None: no method.
        parts, weight: see `segmentation_loss`.
    """

    def __init__(
        self,
        model: Segmenter,
        outputs: Callable[[Tensor], list[Any]] | None = None,
        method_loss: Callable[[Tensor], Tensor | float] | None = None,
        parts: Collection[str] = ("cross_entropy",),
        weight: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model, self.method_loss = model, method_loss
        self.outputs = outputs or model.training_outputs
        self.pixel_loss = partial(segmentation_loss, parts=parts, weight=weight)
        self.decoder_loss = DECODER_LOSSES.get(type(model.decoder))

    def forward(
        self, images: Tensor, labels: Tensor, n_labelled: Callable[[], Tensor], share: float = 1.0
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of a batch, or of a part of it: those of all parts add up.

        Args:
            images: (B, 3, H, W), normalized, or the features that `outputs` takes.
            labels: (B, H, W), int64; what is no class is ignored.
            n_labelled: gives (), the labelled pixels of all processes and parts.
            share: of the images of the batch that are in this part.

        Returns:
            The loss (), and what the merging method adds to it, detached; None: nothing.
        """
        first, *auxiliary = self.outputs(images)
        if self.decoder_loss is None:
            loss = self.pixel_loss(first, labels, n_labelled(), share)
        else:
            loss = share * self.decoder_loss(first, labels)
        for logits in auxiliary:
            loss = loss + AUXILIARY_WEIGHT * self.pixel_loss(logits, labels, n_labelled(), share)
        own = 0.0 if self.method_loss is None else share * self.method_loss(labels)
        if not isinstance(own, Tensor):
            return loss, None
        return loss + own, own.detach()
