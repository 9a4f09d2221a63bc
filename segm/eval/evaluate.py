"""Evaluate a model on a data set: one confusion matrix, image by image; and the images that measuring commands feed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from segm import parallel
from segm.data import Sample, SegmentationDataset, spread
from segm.data.images import Normalization, resized_view
from segm.eval.sliding import Model, Windows, predict_labels
from segm.metrics import confusion_matrix
from segm.sizes import Size, pair

MULTISCALE = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


class Samples(Protocol):
    """An evaluation split of a data set, or a folder of photographs."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Sample: ...


class Views(Sequence[Tensor]):
    """Images resized to one size (ratio not kept) and normalized, in batches (B, 3, H, W), read on demand.

    Args:
        samples: the images.
        size: of the images, pixels.
        normalization: name, or mean and standard deviation.
        n_images: number of images, spread over all of them; None: all.
        batch_size: images per batch; an incomplete last batch is left out, unless it is the only one.
        duplicate: fill every batch with copies of one image, so that adaptive methods keep its own token count.
        device, dtype: of the batches.
    """

    def __init__(
        self,
        samples: Samples,
        size: Size,
        normalization: str | Normalization,
        n_images: int | None = None,
        *,
        batch_size: int = 1,
        duplicate: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        n_images = min(n_images or len(samples), len(samples))
        self.samples, self.size, self.normalization = samples, pair(size), normalization
        self.indices = spread(n_images, len(samples))
        self.batch_size, self.duplicate = batch_size if duplicate else min(batch_size, n_images), duplicate
        self.n_batches = n_images if duplicate else n_images // self.batch_size
        self.device, self.dtype = device, dtype

    def __len__(self) -> int:
        return self.n_batches

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self.n_batches:
            raise IndexError(index)
        if self.duplicate:
            return self._view(index).expand(self.batch_size, -1, -1, -1).contiguous()
        start = index * self.batch_size
        return torch.cat([self._view(i) for i in range(start, start + self.batch_size)])

    def _view(self, index: int) -> Tensor:
        view = resized_view(self.samples[self.indices[index]].image, self.size, self.normalization)
        return view.to(device=self.device, dtype=self.dtype)


class Item(NamedTuple):
    """An image with its label map, and the same image as the model sees it at some scales; workers read it.

    Attributes:
        sample: at the original size.
        views: (3, h, w) each, normalized.
    """

    sample: Sample
    views: list[Tensor]


class Items(Dataset):
    """Samples as `Item`s.

    Args:
        view: from an image, (H, W, 3) uint8 RGB, and a scale to what the model sees, (3, h, w).
        ratios: scales relative to the size of the evaluation.
    """

    def __init__(
        self, samples: Samples, view: Callable[[np.ndarray, float], Tensor], ratios: Sequence[float] = (1.0,)
    ) -> None:
        self.samples, self.view, self.ratios = samples, view, ratios

    def __getitem__(self, index: int) -> Item:
        sample = self.samples[index]
        return Item(sample, [self.view(sample.image, ratio) for ratio in self.ratios])


def read_ahead(items: Dataset, indices: Sequence[int], workers: int, device: torch.device | str) -> DataLoader:
    """Items at the indices one by one, in this order, read by other processes while the model computes.

    Args:
        workers: processes that read; 0: this one does.
        device: of the model; for CUDA the tensors lie in pinned memory.
    """
    return DataLoader(
        items,
        batch_size=None,
        sampler=indices,
        num_workers=min(workers, len(indices)),
        collate_fn=as_is,
        worker_init_fn=parallel.start_worker,
        generator=torch.Generator(),  # else it draws from the one that a training draws from
        pin_memory=torch.device(device).type == "cuda",
    )


def both_ways(views: Sequence[Tensor], flip: bool, device: torch.device | str) -> list[tuple[Tensor, bool]]:
    """Views of an image, (3, h, w), on a device, each with whether it is mirrored; flip: also their mirror images."""
    own = [(view.to(device, non_blocking=True), False) for view in views]
    return own + [(view.flip(-1), True) for view, _ in own] if flip else own


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
        ratios: scales relative to the size of the evaluation.
        flip: also the mirror image at every scale.
        n_images: only so many images, spread over the data set.
        workers: processes that read and resize images; 0: this one does.
        on_image: called with (sample, label map (H, W) int64 on the device) after every image of this process.
        progress: show a bar.

    Returns:
        (C, C), int64, on the CPU; rows are true classes.
    """
    chosen = spread(n_images, len(dataset))
    mine = chosen[parallel.rank() :: parallel.world_size()]
    loader = read_ahead(Items(dataset, dataset.view, ratios), mine, workers, device)
    confusion = torch.zeros(dataset.n_cls, dataset.n_cls, dtype=torch.long, device=device)
    for sample, views in tqdm(loader, desc="evaluation", unit="image", leave=False, disable=not progress):
        labels = predict_labels(model, both_ways(views, flip, device), windows, sample.image.shape[:2])
        if sample.label is not None:
            truth = torch.from_numpy(sample.label.astype(np.int32)).to(device)
            confusion += confusion_matrix(labels, truth, dataset.n_cls)
        if on_image is not None:
            on_image(sample, labels)
    return parallel.all_reduce_sum(confusion).cpu()


def as_is(item: Any) -> Any:
    """Collate function of a loader without batches."""
    return item
