"""The record of a training: `variant.yml`, `log.txt`, TensorBoard events; and the lock of its folder."""

import errno
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from segm import parallel
from segm.config import RunConfig
from segm.errors import TRAINING
from segm.storage import write_text

CURVES = {
    "train_loss": "loss/train",
    "train_learning_rate": "learning_rate",
    "threshold": "threshold",
    "memory_mb": "memory_mb",
    "images_per_second": "images_per_second",
    "data_wait": "data_wait",
    "val_pixel_accuracy": "val/pixel_accuracy",
    "val_mean_accuracy": "val/mean_accuracy",
    "val_mean_iou": "val/mean_iou",
}
WITHOUT_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # NFS, SMB, FUSE
MAX = 1e15  # no curve goes further
LOCK, PATIENCE = ".lock", 5.0  # seconds; the workers of a training that was killed hold the lock a moment longer
logger = logging.getLogger(__name__)


@contextmanager
def run_lock(log_dir: Path) -> Iterator[None]:
    """While open, no other training writes to this run directory; it is made.

    Raises:
        ValueError: another one does.
    """
    with ExitStack() as stack:
        if parallel.is_main():
            log_dir.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(FileLock(log_dir / LOCK, timeout=PATIENCE))
            except Timeout:
                text = f"{log_dir}: another training writes to it; wait for its end, or choose another --log-dir"
                raise ValueError(text) from None
            except (NotImplementedError, OSError) as error:
                if isinstance(error, OSError) and error.errno not in WITHOUT_LOCKS:
                    raise
                logger.warning("%s: its file system has no locks: start no other training there", log_dir)
        yield


def read_log(file: Path) -> list[dict[str, Any]]:
    """Entries of a `log.txt`; lines that are none are left out, with a warning.

    An entry is a JSON object with an epoch from 0, whose values for curves are numbers or null.
    """
    entries, n_others = [], 0
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            entry = None
        if is_entry(entry):
            entries.append(entry)
        elif line.strip():
            n_others += 1
    if n_others:
        logger.warning("%s: %d line(s) are no entries of a training and are left out", file, n_others)
    return entries


def is_entry(entry: Any) -> bool:
    """Return whether a JSON value is what a training writes about an epoch."""
    if not isinstance(entry, dict) or type(entry.get("epoch")) is not int or not 0 <= entry["epoch"] < MAX:
        return False
    values = [entry.get(key) for key in CURVES]
    return all(value is None or (type(value) in (int, float) and -MAX < value < MAX) for value in values)


class RunLog:
    """Writes the settings of a run at once and an entry per epoch.

    Args:
        log_dir: the run directory; it is made.
        config: is written to `variant.yml`.
        start_epoch: entries from this epoch on are forgotten: an interrupted epoch is done again.
    """

    def __init__(self, log_dir: str | Path, config: RunConfig, start_epoch: int = 0) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter  # reading a log does not need it
        except ModuleNotFoundError as error:
            raise ValueError(f"a training writes curves for TensorBoard, which is not installed: {TRAINING}") from error
        self.file = Path(log_dir) / "log.txt"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        config.write(log_dir)
        if self.file.exists():
            kept = [entry for entry in read_log(self.file) if entry["epoch"] < start_epoch]
            write_text(self.file, "".join(json.dumps(entry) + "\n" for entry in kept))
        self.events: Any = SummaryWriter(log_dir, purge_step=start_epoch)

    def write(self, entry: Mapping[str, Any]) -> None:
        """Append a JSON object to `log.txt` and its values to the TensorBoard curves."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        try:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite) + "\n")
            for key, curve in CURVES.items():
                if entry.get(key) is not None:
                    self.events.add_scalar(curve, entry[key], entry["epoch"])
        except OSError as error:  # a training needs no record of itself
            logger.warning("cannot write %s: %s", self.file, error.strerror)

    def close(self) -> None:
        """Finish the event file."""
        self.events.close()
