"""The losses of all pixels: against slow references, with labels that are ignored, in parts."""

import pytest
import torch

from segm.config import LOSSES
from segm.losses import balanced_weights, segmentation_loss


@pytest.fixture(params=[5, 300])
def batch(request):
    """Logits and labels of three images, one of them without a label; more classes are ignored by another number."""
    torch.manual_seed(0)
    n_cls, ignored = request.param, 255 if request.param == 5 else 65535
    logits, labels = torch.randn(3, n_cls, 6, 7, requires_grad=True), torch.randint(n_cls, (3, 6, 7))
    labels[0, :3] = labels[2] = ignored
    return logits, labels


def true_probabilities(logits, labels):
    """Label -> softmax of it, of every labelled pixel, image by image."""
    for image, label in zip(logits.softmax(1), labels, strict=True):
        where = (label < len(image)).nonzero().tolist()
        yield [(int(label[y, x]), image[:, y, x]) for y, x in where]


def dice(logits, labels):
    images = []
    for pixels in true_probabilities(logits, labels):
        scores = []
        for c in {label for label, _ in pixels}:
            overlap = sum(p[c] for label, p in pixels if label == c)
            scores.append(1 - 2 * overlap / (sum(p[c] for _, p in pixels) + sum(label == c for label, _ in pixels)))
        images.append(sum(scores) / len(scores) if scores else torch.tensor(0.0))
    return sum(images) / len(images)


def mean(logits, labels, weight, of_pixel):
    values = [weight[c] * of_pixel(p[c]) for pixels in true_probabilities(logits, labels) for c, p in pixels]
    return sum(values) / len(values)


def test_losses_are_those_by_hand(batch):
    logits, labels = batch
    weight = torch.rand(logits.shape[1])
    expected = {
        "cross_entropy": mean(logits, labels, weight, lambda p: -p.log()),
        "focal": mean(logits, labels, weight, lambda p: -((1 - p) ** 2) * p.log()),
        "dice": dice(logits, labels),
    }
    for name in LOSSES:
        torch.testing.assert_close(segmentation_loss(logits, labels, parts=[name], weight=weight), expected[name])
    torch.testing.assert_close(segmentation_loss(logits, labels, parts=LOSSES, weight=weight), sum(expected.values()))


def test_pixels_without_a_label_teach_nothing(batch):
    logits, labels = batch
    segmentation_loss(logits, labels, parts=LOSSES).backward()
    ignored = (labels >= logits.shape[1]).unsqueeze(1).expand_as(logits)
    assert logits.grad[ignored].abs().max() == 0 < logits.grad[~ignored].abs().min()
    assert segmentation_loss(logits, torch.full_like(labels, labels.max()), parts=LOSSES) == 0


def test_losses_of_parts_add_up(batch):
    logits, labels = batch
    n_labelled = (labels < logits.shape[1]).sum()
    parts = [
        segmentation_loss(logits[own], labels[own], n_labelled, len(labels[own]) / 3, parts=LOSSES)
        for own in (slice(1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), segmentation_loss(logits, labels, parts=LOSSES))


def test_frequent_classes_count_less():
    """Median frequency over frequency; a class without a pixel counts as the rarest one."""
    assert balanced_weights([100, 10, 0, 1000]) == [1.0, 10.0, 10.0, 0.1]
    with pytest.raises(ValueError, match="no pixel"):
        balanced_weights([0, 0])
