"""What SegViT's decoder is trained with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from segm.data.dataset import IGNORE_LABEL
from segm.model.masks import Prediction
from segm.model.upsample import upsample

ABSENT_WEIGHT = 0.1  # of the class "not in this image"
FOCAL_WEIGHT = 20.0


def segvit_loss(stages: Sequence[Prediction], labels: Tensor) -> Tensor:
    """The sum over the stages: which classes are in an image, and where (section 3.3).

    Query c belongs to class c, so nothing is matched. Pixels without a label are left out.

    Args:
        stages: from `SegViT`.
        labels: (B, H, W), int64, 255 is ignored.
    """
    n_cls = stages[0].masks.shape[1]
    labeled = labels != IGNORE_LABEL
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
    focal = sigmoid_focal_loss(logits, masks, alpha=0.25, gamma=2) * where
    focal = focal.flatten(1).sum(1) / where.flatten(1).sum(1).clamp(min=1)
    probability = logits.sigmoid() * where
    overlap, both = (probability * masks).flatten(1).sum(1), (probability + masks).flatten(1).sum(1)
    dice = 1 - (2 * overlap + 1) / (both + 1)
    return (FOCAL_WEIGHT * focal + dice).sum()
