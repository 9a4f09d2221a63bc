"""The training loop. It knows neither files nor merging; what a caller wants to happen comes as a callback."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from segm import parallel
from segm.data.dataset import IGNORE_LABEL, SegmentationDataset, mix_seeds

SHOW_EVERY = 10  # updates between readings of the loss: each one waits for the device


def compile_blocks(blocks: Iterable[Any], backend: str = "inductor") -> None:
    """Compile attention and MLP of transformer blocks, in place, once for all token counts.

    What lies between them, where a patched block merges, stays as it is; so do parameters and state-dict keys.

    Args:
        blocks: timm's `Block`s, patched or not.
        backend: of `torch.compile`.
    """
    for block in blocks:
        for part in (block.attn, block.mlp):
            part.compile(dynamic=True, backend=backend)


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


@dataclass
class Precision:
    """Mixed precision: bfloat16 where the device has it, else float16 with a loss scaler; or none.

    Attributes:
        device_type: "cpu" or "cuda".
        dtype: that of the forward pass, None for float32.
        scaler: gradient scaler, inactive unless dtype is float16.
    """

    device_type: str
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler

    @classmethod
    def choose(cls, device: torch.device, amp: bool) -> "Precision":
        """Precision for a device; amp: whether mixed precision is wanted."""
        has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = (torch.bfloat16 if has_bfloat16 else torch.float16) if amp else None
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        return cls(device.type, dtype, scaler)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the labelled pixels; a batch without any gives 0 instead of NaN.

    With several processes, the mean of their losses is that over the labelled pixels of all.

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W), int64, 255 is ignored.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_LABEL, reduction="sum")
    count = parallel.sum_over_processes((labels != IGNORE_LABEL).sum())
    return total * parallel.world_size() / count.clamp(min=1)


Loss = Callable[[Tensor, Tensor], Tensor]
AUXILIARY_WEIGHT = 0.4  # of an auxiliary head in the loss (PSPNet, section 4; SETR)


@dataclass
class Position:
    """How far an epoch has come in this process.

    Attributes:
        updates: done.
        losses: (2,), float64, on the device: sum and number of their losses.
    """

    updates: int
    losses: Tensor

    @classmethod
    def beginning(cls, device: torch.device) -> "Position":
        """Nothing is done yet."""
        return cls(0, torch.zeros(2, dtype=torch.float64, device=device))


def train_one_epoch(
    model: nn.Module,
    loader: DataLoader,
    optimizer: Optimizer,
    scheduler: Scheduler,
    precision: Precision,
    epoch: int,
    *,
    device: torch.device,
    loss: Loss = segmentation_loss,
    seed: int = 0,
    position: Position | None = None,
    after_update: Callable[[Position], None] | None = None,
    progress: bool = True,
) -> dict[str, float]:
    """Train for one epoch, or for what is left of it.

    All random numbers of an update depend on the seed, the number of the update and the process alone, so that an
    interruption changes nothing.

    Args:
        model: images -> logits, or a list of them, those of auxiliary heads last; may be wrapped in
            DistributedDataParallel.
        loader: from `create_loader`.
        scheduler: from `segm.optim.create_scheduler`.
        precision: `Precision`.
        epoch: counted from 0.
        loss: from logits (B, C, H, W) and labels (B, H, W) to the number that falls.
        position: where the epoch was interrupted; it is counted on. None: at its beginning.
        after_update: called after every update; what it raises ends the epoch.

    Returns:
        dict: `train_loss` (mean over updates and processes), `train_learning_rate` (at the end), `num_updates`
        (so far); and of the updates made now `images_per_second`, `data_wait` (percent of the time that went into
        waiting for batches) and `memory_mb` (peak of the device; on the CPU of the process, where the system tells);
        `skipped_images` of this process, if there are any.

    Raises:
        ValueError: the loss is not finite; names the images.
    """
    done = position or Position.beginning(device)
    sampler = cast(EpochSampler, loader.sampler)
    batch_size = loader.batch_size or 1
    sampler.epoch, sampler.skip = epoch, done.updates * batch_size
    before, first, n_left = epoch * len(loader), done.updates, len(loader) - done.updates
    model.train()
    scheduler.step(epoch)
    if not n_left:
        scheduler.step_update(before + done.updates - 1)
    waits: list[float] = []
    begin = time.perf_counter()
    unread: list[Tensor] = []  # losses since the device was last waited for
    n_skipped = 0
    bar = tqdm(
        _timed(loader, n_left, waits),
        f"epoch {epoch + 1}",
        len(loader),
        initial=first,
        unit="batch",
        leave=False,
        disable=not progress,
    )
    for batch in bar:
        number = before + done.updates
        scheduler.step_update(number)
        torch.manual_seed(mix_seeds(seed, number, parallel.rank()))  # for dropout and the like
        current = _update(model, batch, optimizer, precision, device, loss)
        unread.append(current)
        done.updates += 1
        n_skipped += int(batch["skipped"].sum()) if "skipped" in batch else 0
        done.losses += torch.stack([current.double(), torch.ones_like(current, dtype=torch.float64)])
        if number % SHOW_EVERY == SHOW_EVERY - 1 or done.updates == len(loader):
            last = _read(unread, loader, done.updates)
            bar.set_postfix(loss=f"{last:.3f}", lr=f"{_learning_rate(optimizer):.2e}", refresh=False)
        if after_update is not None:
            after_update(done)
    loss_sum, n_batches = parallel.gather(done.losses).sum(0).tolist()  # waits for the device
    seconds = time.perf_counter() - begin
    return {
        "train_loss": loss_sum / n_batches,
        "train_learning_rate": _learning_rate(optimizer),
        "num_updates": before + done.updates,
        "images_per_second": n_left * batch_size * parallel.world_size() / seconds,
        "data_wait": 100 * sum(waits) / seconds,
        "memory_mb": _peak_memory(device),
    } | ({"skipped_images": n_skipped} if n_skipped else {})


def _learning_rate(optimizer: Optimizer) -> float:
    """The one that the schedule says, before any parameter's own factor."""
    return max(group["lr"] / group.get("lr_scale", 1) for group in optimizer.param_groups)


def _read(unread: list[Tensor], loader: DataLoader, n_done: int) -> float:
    """The last of some losses, which are read and forgotten; raises a ValueError that names the images of a bad one."""
    losses = torch.stack(unread).tolist()
    unread.clear()
    for loss, update in zip(losses, range(n_done - len(losses), n_done), strict=True):
        if not math.isfinite(loss):
            size, dataset = loader.batch_size or 1, cast(SegmentationDataset, loader.dataset)
            order = cast(EpochSampler, loader.sampler).order
            names = [dataset.name_of(index) for index in order[update * size : (update + 1) * size]]
            raise ValueError(
                f"the loss is {loss} in a batch of {', '.join(names)}: lower the learning rate, or look at these images"
            )
    return losses[-1]


def _timed(batches: DataLoader, n_left: int, waits: list[float]) -> Iterator[dict[str, Tensor]]:
    """The batches that are left of an epoch; appends the seconds that each one was waited for."""
    iterator: Iterator[Any] = iter(batches) if n_left else iter(())
    for _ in range(n_left):
        start = time.perf_counter()
        batch = next(iterator)
        waits.append(time.perf_counter() - start)
        yield batch


def _update(
    model: nn.Module,
    batch: dict[str, Tensor],
    optimizer: Optimizer,
    precision: Precision,
    device: torch.device,
    criterion: Loss,
) -> Tensor:
    """One optimizer step; returns the loss, detached."""
    images = batch["image"].to(device, non_blocking=True)
    labels = batch["label"].to(device, non_blocking=True)
    with precision.autocast():
        outputs = model(images)
        first, *others = outputs if isinstance(outputs, list) else [outputs]
        loss = criterion(first, labels)
        for logits in others:
            loss = loss + AUXILIARY_WEIGHT * segmentation_loss(logits, labels)
    optimizer.zero_grad(set_to_none=True)
    precision.scaler.scale(loss).backward()
    precision.scaler.step(optimizer)
    precision.scaler.update()
    return loss.detach()


def _peak_memory(device: torch.device) -> float | None:
    """MiB; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # Unix alone has it
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB on Linux
