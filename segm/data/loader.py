"""Training batches in an order that depends on the seed and the epoch alone."""

from collections.abc import Iterator, Sized
from typing import cast

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from segm import parallel


class EpochSampler(Sampler):
    """Shuffled (round, index) pairs of this process; a round is one through all images.

    The order depends on the seed and the round alone, and the round travels with the index, so that the data set
    can augment every image by (seed, round, index): a resumed training sees what an uninterrupted one sees,
    whatever the number of workers. It leaves out the first `skip` images of this process, which were trained on
    before an interruption.

    Args:
        n_images: of the data set.
        batch_size: images per batch of this process.
        seed: of the order.
        n_batches: of an epoch; None: those of a round.
    """

    def __init__(self, n_images: int, batch_size: int, seed: int = 0, n_batches: int | None = None) -> None:
        self.n_images, self.seed = n_images, seed
        self.epoch = 0
        self.skip = 0
        self.batch_size = min(batch_size, n_images)
        self.per_round = max(1, n_images // (self.batch_size * parallel.world_size()))  # batches
        self.n_batches = n_batches or self.per_round

    def __len__(self) -> int:
        return self.n_batches * self.batch_size

    @property
    def pairs(self) -> list[tuple[int, int]]:
        """Those of this epoch; an update is made of the same images, however many processes share it."""
        first = self.epoch * self.n_batches
        rounds = range(first // self.per_round, (first + self.n_batches - 1) // self.per_round + 1)
        pairs = [(number, index) for number in rounds for index in self._order(number)]
        start = first % self.per_round * self.batch_size
        return pairs[start : start + len(self)]

    def _order(self, number: int) -> list[int]:
        """The images of this process in a round."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        order = torch.randperm(self.n_images, generator=generator)
        batches = torch.arange(self.per_round) * parallel.world_size() + parallel.rank()
        places = batches[:, None] * self.batch_size + torch.arange(self.batch_size)
        return order[places.flatten() % self.n_images].tolist()

    def batch(self, index: int) -> list[int]:
        """The images of one batch of this epoch."""
        return [image for _, image in self.pairs[index * self.batch_size : (index + 1) * self.batch_size]]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self.pairs[self.skip :])


def create_loader(
    dataset: Dataset,
    batch_size: int,
    seed: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    n_batches: int | None = None,
) -> DataLoader:
    """Training batches of this process: dicts of `image` (B, 3, h, w) and `label` (B, h, w); see `EpochSampler`."""
    sampler = EpochSampler(len(cast(Sized, dataset)), batch_size, seed, n_batches)
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
