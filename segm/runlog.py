"""The record of a training: `variant.yml`, `log.txt`, TensorBoard events."""

import json
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from segm.checkpoint import write_variant

CURVES = {
    "train_loss": "loss/train",
    "train_learning_rate": "learning_rate",
    "threshold": "threshold",
    "memory_mb": "memory_mb",
    "images_per_second": "images_per_second",
    "val_pixel_accuracy": "val/pixel_accuracy",
    "val_mean_accuracy": "val/mean_accuracy",
    "val_mean_iou": "val/mean_iou",
}


class RunLog:
    """Writes the settings of a run at once and an entry per epoch.

    Args:
        log_dir: the run directory; it is made.
        variant: content of `variant.yml`.
    """

    def __init__(self, log_dir, variant):
        self.file = Path(log_dir) / "log.txt"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_variant(variant, log_dir)
        self.events = SummaryWriter(log_dir)

    def write(self, entry):
        """Append a JSON object to `log.txt` and its values to the TensorBoard curves."""
        with self.file.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        for key, curve in CURVES.items():
            if entry.get(key) is not None:
                self.events.add_scalar(curve, entry[key], entry["epoch"])

    def close(self):
        """Finish the event file."""
        self.events.close()
