"""Scores against mmsegmentation's."""

import numpy as np
import pytest
import torch

from segm.metrics import confusion_matrix, segmentation_scores


def mmseg_scores(predictions, labels, n_cls):
    """mmsegmentation's own accumulation over the same maps."""
    from mmseg.evaluation import IoUMetric

    import segm.data.openmmlab  # noqa: F401 - keeps the import of mmseg quiet

    areas = [
        IoUMetric.intersect_and_union(p.clone(), t.clone(), n_cls, 255)
        for p, t in zip(predictions, labels, strict=True)
    ]
    totals = [sum(area) for area in zip(*areas, strict=True)]
    scores = IoUMetric.total_area_to_metrics(*totals, metrics=["mIoU"])
    return scores["aAcc"], np.nanmean(scores["Acc"]), np.nanmean(scores["IoU"]), scores["IoU"]


def test_scores_are_those_of_mmsegmentation():
    """Also for classes that never occur, and with ignored pixels."""
    for absent in ((), (3,), (0, 6)):
        n_cls, known = 7, torch.tensor([c for c in range(7) if c not in absent])
        labels = [known[torch.randint(len(known), (40, 50))] for _ in range(5)]
        others = [known[torch.randint(len(known), (40, 50))] for _ in range(5)]
        predictions = [torch.where(torch.rand(40, 50) < 0.7, t, o) for t, o in zip(labels, others, strict=True)]
        for label in labels:
            label[torch.rand(40, 50) < 0.1] = 255
        confusion = sum(confusion_matrix(p, t, n_cls) for p, t in zip(predictions, labels, strict=True))
        scores = segmentation_scores(confusion)
        accuracy, mean_accuracy, mean_iou, per_class = mmseg_scores(predictions, labels, n_cls)
        assert scores["pixel_accuracy"] == pytest.approx(100 * accuracy, abs=0.006)
        assert scores["mean_accuracy"] == pytest.approx(100 * mean_accuracy, abs=0.006)
        assert scores["mean_iou"] == pytest.approx(100 * mean_iou, abs=0.006)
        np.testing.assert_allclose(np.array(scores["per_class_iou"], float), 100 * per_class, atol=0.006)
        assert all(scores["per_class_iou"][c] is None for c in absent) and scores["n_scored"] == 7 - len(absent)


def test_nothing_labelled_is_no_score():
    with pytest.raises(ValueError, match="no pixel"):
        segmentation_scores(torch.zeros(3, 3, dtype=torch.long))


def test_confusion_matrix_counts_every_labelled_pixel_once():
    label, prediction = torch.tensor([[0, 1, 255], [2, 2, 1]]), torch.tensor([[0, 2, 1], [2, 0, 1]])
    expected = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 0, 1]])
    assert torch.equal(confusion_matrix(prediction, label, 3), expected)
