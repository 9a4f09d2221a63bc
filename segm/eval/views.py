"""The images that the measuring commands feed."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from segm.data import Sample, spread
from segm.data.images import Normalization, resized_view
from segm.sizes import Size, pair


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
