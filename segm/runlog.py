"""The record of a training: `variant.yml`, `log.txt`, TensorBoard events."""

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from segm.checkpoint import write_variant
from segm.files import write_text

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


class RunLog:
    """Writes the settings of a run at once and an entry per epoch.

    Args:
        log_dir: the run directory; it is made.
        start_epoch: entries from this epoch on are forgotten: an interrupted epoch is done again.
        variant: content of `variant.yml`.
    """

    def __init__(self, log_dir: str | Path, variant: dict[str, Any], start_epoch: int = 0) -> None:
        self.file = Path(log_dir) / "log.txt"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_variant(variant, log_dir)
        if self.file.exists():
            lines = self.file.read_text().splitlines(keepends=True)
            write_text(self.file, "".join(line for line in lines if json.loads(line)["epoch"] < start_epoch))
        self.events = SummaryWriter(log_dir)

    def write(self, entry: dict[str, Any]) -> None:
        """Append a JSON object to `log.txt` and its values to the TensorBoard curves."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with self.file.open("a") as file:
            file.write(json.dumps(finite) + "\n")
        for key, curve in CURVES.items():
            if entry.get(key) is not None:
                self.events.add_scalar(curve, entry[key], entry["epoch"])

    def close(self) -> None:
        """Finish the event file."""
        self.events.close()
