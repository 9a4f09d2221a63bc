"""The training loop. It knows neither files nor merging; what a caller wants to happen comes as a callback."""

import math
import resource
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm

from segm import parallel
from segm.data.dataset import SegmentationDataset
from segm.data.sample import IGNORE_LABEL

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
    whatever the number of workers.
    """

    def __init__(self, n_images: int, batch_size: int, seed: int = 0) -> None:
        self.n_images = n_images
        self.seed = seed
        self.epoch = 0
        self.per_process = max(n_images // parallel.world_size(), min(n_images, batch_size))

    def __len__(self) -> int:
        return self.per_process

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.n_images, generator=generator)
        share = order.roll(-parallel.rank() * self.per_process)[: self.per_process]
        return iter([(self.epoch, index) for index in share.tolist()])


def create_loader(
    dataset: SegmentationDataset, batch_size: int, seed: int = 0, workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """Training batches of this process: dicts of `image` (B, 3, h, w) and `label` (B, h, w)."""
    return DataLoader(
        dataset,
        batch_size=min(batch_size, len(dataset)),
        sampler=EpochSampler(len(dataset), batch_size, seed),
        num_workers=workers,
        persistent_workers=workers > 0,
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

    Args:
        logits: (B, C, H, W).
        labels: (B, H, W), int64, 255 is ignored.
    """
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_LABEL, reduction="sum")
    return total / (labels != IGNORE_LABEL).sum().clamp(min=1)


Loss = Callable[[Tensor, Tensor], Tensor]


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
    progress: bool = True,
) -> dict[str, float]:
    """Train for one epoch.

    Args:
        model: images -> logits; may be wrapped in DistributedDataParallel.
        loader: from `create_loader`.
        scheduler: from `segm.optim.create_scheduler`.
        precision: `Precision`.
        epoch: counted from 0.
        loss: from logits (B, C, H, W) and labels (B, H, W) to the number that falls.

    Returns:
        dict: `train_loss` (mean over updates and processes), `train_learning_rate` (at the end), `num_updates`
        (so far), `images_per_second`, `data_wait` (percent of the time that went into waiting for batches) and
        `memory_mb` (peak of the device; on the CPU of the process).

    Raises:
        ValueError: the loss is not finite.
    """
    torch.manual_seed(seed * 1_000_003 + 1000 * epoch + parallel.rank())  # dropout as in an uninterrupted run
    sampler: Any = loader.sampler
    sampler.epoch = epoch
    model.train()
    scheduler.step(epoch)
    n_updates = epoch * len(loader)
    total_loss = torch.zeros(2, dtype=torch.float64, device=device)
    waits: list[float] = []
    start = time.perf_counter()
    batches = _timed(loader, waits)
    bar = tqdm(batches, f"epoch {epoch + 1}", len(loader), unit="batch", leave=False, disable=not progress)
    for batch in bar:
        scheduler.step_update(n_updates)
        current = _update(model, batch, optimizer, precision, device, loss)
        n_updates += 1
        total_loss += torch.stack([current.double(), torch.ones_like(current, dtype=torch.float64)])
        if n_updates % SHOW_EVERY == 0:
            lr = optimizer.param_groups[0]["lr"]
            bar.set_postfix(loss=f"{_finite(current.item()):.3f}", lr=f"{lr:.2e}", refresh=False)
    loss_sum, n_batches = parallel.sum_over_processes(total_loss).tolist()  # waits for the device
    seconds = time.perf_counter() - start
    return {
        "train_loss": _finite(loss_sum / n_batches),
        "train_learning_rate": optimizer.param_groups[0]["lr"],
        "num_updates": n_updates,
        "images_per_second": len(loader) * (loader.batch_size or 1) * parallel.world_size() / seconds,
        "data_wait": 100 * sum(waits) / seconds,
        "memory_mb": _peak_memory(device),
    }


def _timed(batches: DataLoader, waits: list[float]) -> Iterator[dict[str, Tensor]]:
    """The same batches; appends the seconds that each one was waited for."""
    iterator = iter(batches)
    for _ in range(len(batches)):
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
        loss = criterion(model(images), labels)
    optimizer.zero_grad(set_to_none=True)
    precision.scaler.scale(loss).backward()
    precision.scaler.step(optimizer)
    precision.scaler.update()
    return loss.detach()


def _peak_memory(device: torch.device) -> float:
    """MiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10  # Linux counts KiB


def _finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}: lower the learning rate")
    return loss
