"""Options with which a method costs as much as another: what `patch.budget.options_for` leaves to the studies."""

from collections.abc import Sequence

from torch import Tensor

import patch
from patch.budget import KNOBS as OPTIONS
from patch.budget import knob_of, options_for, tokens_left
from patch.operations import count_operations
from segm.model.segmenter import Segmenter

__all__ = ["FIXED", "FLAGS", "KNOBS", "NEEDS_TRAINING", "gflops", "options_for", "tokens_left"]
# Method -> the option that sets its cost, and its range.
KNOBS = {name: (knob, *OPTIONS[knob]) for name in patch.METHODS if (knob := knob_of(name)) is not None}
FLAGS = {name: "--" + name.replace("_", "-") for name in ("patch_size", *(knob[0] for knob in KNOBS.values()))}
FLAGS["keep"] = "--keep-rate"
FIXED = ("fpet", "mpm", "clustvit")  # no option sets their cost
NEEDS_TRAINING = ("dtem", "clustvit")


def gflops(model: Segmenter, batches: Sequence[Tensor]) -> float:
    """10⁹ operations per image, mean over the batches (B, 3, H, W)."""
    return sum(count_operations(model, images).total for images in batches) / len(batches)
