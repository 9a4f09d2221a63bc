"""Training batches in an order that depends on the seed and the epoch alone."""

from collections.abc import Iterator, Sized
from typing import cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from segm import parallel


class EpochSampler(Sampler):
    """Shuffled (epoch, index) pairs of this process.

    The order depends on the seed and the epoch alone, and the epoch travels with the index, so that the data set
    can augment every image by (seed, epoch, index): a resumed training sees what an uninterrupted one sees,
    whatever the number of workers. It leaves out the first `skip` images of this process, which were trained on
    before an interruption.
    """

    def __init__(self, n_images: int, batch_size: int, seed: int = 0) -> None:
        self.n_images, self.seed = n_images, seed
        self.epoch = 0
        self.skip = 0
        self.batch_size = min(batch_size, n_images)
        self.n_batches = max(1, n_images // (self.batch_size * parallel.world_size()))

    def __len__(self) -> int:
        return self.n_batches * self.batch_size

    @property
    def order(self) -> list[int]:
        """The images of this process in this epoch; an update is made of the same ones, however many share it."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.n_images, generator=generator)
        batches = torch.arange(self.n_batches) * parallel.world_size() + parallel.rank()
        places = batches[:, None] * self.batch_size + torch.arange(self.batch_size)
        return order[places.flatten() % self.n_images].tolist()

    def batch(self, index: int) -> list[int]:
        """The images of one batch of this epoch."""
        return self.order[index * self.batch_size : (index + 1) * self.batch_size]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter([(self.epoch, index) for index in self.order[self.skip :]])


def create_loader(
    dataset: Dataset, batch_size: int, seed: int = 0, workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Training batches of this process: dicts of `image` (B, 3, h, w) and `label` (B, h, w)."""
    sampler = EpochSampler(len(cast(Sized, dataset)), batch_size, seed)
    return DataLoader(
        dataset,
        batch_size=sampler.batch_size,
        sampler=sampler,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=parallel.start_worker,
        generator=torch.Generator(),  # else it draws from the one that dropout draws from, once per training
        pin_memory=pin_memory,
        drop_last=True,
    )
