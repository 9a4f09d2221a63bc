"""Evaluate a model on a data set: one confusion matrix, image by image."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from segm import parallel
from segm.data import Sample, SegmentationDataset, spread
from segm.eval.sliding import Model, Windows, predict_labels
from segm.metrics import confusion_matrix

MULTISCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def image_views(
    dataset: SegmentationDataset,
    image: np.ndarray,
    ratios: Sequence[float] = (1.0,),
    flip: bool = False,
    device: torch.device | str | None = None,
) -> list[tuple[Tensor, bool]]:
    """The scaled and mirrored versions of an image that are evaluated together.

    Args:
        dataset: gives `view(image, ratio)`.
        image: (H, W, 3), uint8, RGB.
        ratios: scales relative to the size of the evaluation.
        flip: also take the mirror image of each.

    Returns:
        List of (tensor (3, h, w), flipped).
    """
    views = [(dataset.view(image, ratio).to(device), False) for ratio in ratios]
    return views + [(view.flip(-1), True) for view, _ in views] if flip else views


@torch.inference_mode()
def evaluate(
    model: Model,
    dataset: SegmentationDataset,
    windows: Windows,
    *,
    ratios: Sequence[float] = (1.0,),
    flip: bool = False,
    device: torch.device | str = "cpu",
    n_images: int | None = None,
    workers: int = 0,
    on_image: Callable[[Sample, Tensor], None] | None = None,
    progress: bool = False,
) -> Tensor:
    """Confusion matrix of a model over a data set, summed over all processes.

    Every image is predicted once, at its original size; nothing but the matrix is kept.

    Args:
        model: images -> logits, in evaluation mode.
        dataset: an evaluation split of `segm.data`.
        windows: `segm.eval.sliding.Windows`.
        ratios, flip: see `image_views`.
        n_images: only so many images, spread over the data set.
        workers: processes that read images.
        progress: show a bar.
        on_image: called with (sample, label map (H, W) int64 on the device) after every image of this process.

    Returns:
        (C, C), int64, on the CPU; rows are true classes.
    """
    chosen = spread(n_images, len(dataset))
    mine = chosen[parallel.rank() :: parallel.world_size()]
    options: dict[str, Any] = {"collate_fn": as_is, "worker_init_fn": parallel.start_worker}
    loader = DataLoader(dataset, batch_size=None, sampler=mine, num_workers=workers, **options)
    confusion = torch.zeros(dataset.n_cls, dataset.n_cls, dtype=torch.long, device=device)
    for sample in tqdm(loader, desc="evaluation", unit="image", leave=False, disable=not progress):
        views = image_views(dataset, sample.image, ratios, flip, device)
        labels = predict_labels(model, views, windows, sample.image.shape[:2])
        if sample.label is not None:
            truth = torch.from_numpy(sample.label).to(device)
            confusion += confusion_matrix(labels, truth, dataset.n_cls)
        if on_image is not None:
            on_image(sample, labels)
    return parallel.all_reduce_sum(confusion).cpu()


def as_is(sample: Any) -> Any:
    """Collate function of a loader without batches."""
    return sample
