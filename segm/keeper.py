"""Keeps what a training reaches: one writer per run directory, checkpoints in time, and a good end after a signal."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from segm import parallel
from segm.checkpoint import BEST, LAST, Progress, save_checkpoint
from segm.engine import Position
from segm.interruption import Interruption, SignalError

logger = logging.getLogger(__name__)
LOCK, PATIENCE = ".lock", 5.0  # seconds; the workers of a training that was killed hold the lock a moment longer


@contextmanager
def only_writer(log_dir: Path) -> Iterator[None]:
    """While open, no other training writes to this run directory; it is made.

    Raises:
        ValueError: another one does.
    """
    if not parallel.is_main():
        yield
        return
    log_dir.mkdir(parents=True, exist_ok=True)
    lock = FileLock(log_dir / LOCK)
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise ValueError(
            f"{log_dir}: another training writes to it; wait for its end, or choose another --log-dir"
        ) from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        yield
    finally:
        lock.release()


class Keeper:
    """Writes the checkpoints of a training, and ends it when a signal asks for that.

    Args:
        log_dir: the run directory.
        state: from a `Progress` to the content of a checkpoint.
        best: highest mIoU so far, percent.
        updates_per_epoch: how many.
        every: minutes between two checkpoints inside an epoch; None: only after epochs.
        interruption: what signals ask for.
    """

    def __init__(
        self,
        log_dir: Path,
        state: Callable[[Progress], dict[str, Any]],
        best: float,
        updates_per_epoch: int,
        every: float | None,
        interruption: Interruption,
    ) -> None:
        self.file, self.best = log_dir / LAST, best
        self._state, self._updates_per_epoch = state, updates_per_epoch
        self._seconds = None if every is None else 60 * every
        self._interruption = interruption
        self._saved = time.monotonic()

    def save(self, epoch: int, position: Position) -> bool:
        """Write the last checkpoint in the middle of an epoch; every process calls it.

        Returns:
            Whether it did: weights behind a loss that is not finite are not worth it.
        """
        losses = parallel.gather(position.losses).cpu()
        if not losses.isfinite().all():
            return False
        if parallel.is_main():
            progress = Progress(epoch, position.updates, self._updates_per_epoch, losses, self.best)
            save_checkpoint(self._state(progress), self.file)
        self._saved = time.monotonic()
        return True

    def save_epoch(self, epoch: int, score: float, write: Callable[[], None]) -> None:
        """Write the checkpoints behind an epoch; the main process calls it.

        Args:
            epoch: the one that is over.
            score: its mIoU; below all others if it does not compete.
            write: records the epoch, between best and last checkpoint: what the last one holds need not be done again.
        """
        is_best, self.best = score > self.best, max(score, self.best)
        state = self._state(Progress(epoch + 1, best=self.best))
        if is_best:
            save_checkpoint(state, self.file.with_name(BEST))
        write()
        save_checkpoint(state, self.file)
        self._saved = time.monotonic()

    def after_update(self, epoch: int, position: Position) -> None:
        """Save if it is time, and end the training if a signal asks for it; every process calls it.

        Raises:
            SignalError: a signal.
        """
        late = self._seconds is not None and time.monotonic() - self._saved > self._seconds
        wish = parallel.highest(self._interruption.status or int(late and parallel.is_main()))
        if wish and self.save(epoch, position) and wish > 1:
            where = f"update {position.updates} of {self._updates_per_epoch} of epoch {epoch + 1}"
            raise SignalError(f"ended by a signal after {where}, which {self.file} holds: go on with --resume", wish)

    def after_image(self, *_: Any) -> None:
        """End the training if a signal asks for it during an evaluation, before which it was saved.

        Raises:
            SignalError: a signal.
        """
        status = self._interruption.status
        if status:
            raise SignalError(
                f"ended by a signal during the evaluation: {self.file} holds all, go on with --resume", status
            )


def position_in(progress: Progress, updates_per_epoch: int, device: torch.device) -> Position | None:
    """Where this process goes on inside an epoch; None: at its beginning, also if its batches have become others."""
    losses = progress.losses
    if not progress.updates or losses is None:
        return None
    if progress.updates_per_epoch != updates_per_epoch or len(losses) != parallel.world_size():
        logger.warning("epoch %d begins anew: %d updates of it had other batches", progress.epoch + 1, progress.updates)
        return None
    return Position(progress.updates, losses[parallel.rank()].clone().to(device))
