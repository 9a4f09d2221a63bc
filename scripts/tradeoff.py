"""Scores and costs of a run under many settings: measured once, kept in a file, all speeds in one go."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from segm.data import SegmentationDataset, fingerprint
from segm.eval.cost import compare
from segm.merging import PURE
from segm.run import Run
from segm.storage import write_text

Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A way to use a run.

    Attributes:
        method, options: of merging, as `segm.merging.apply` takes them.
        im_size: shorter side of the images, pixels; None: the run's.
        patch_size: pixels; None: the run's.
    """

    method: str = PURE
    options: Mapping[str, Any] = field(default_factory=dict)
    im_size: int | None = None
    patch_size: int | None = None

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def key(self) -> str:
        """Tells settings apart, also across files."""
        return json.dumps(self.record, sort_keys=True, default=list)

    @property
    def record(self) -> Row:
        """As a row of results keeps it."""
        return {**vars(self), "options": dict(self.options)}

    def apply_to(self, run: Run) -> Run:
        """The run used in this way; it shares its weights."""
        return run.with_settings(self.method, self.options, self.im_size, self.patch_size)


@dataclass(frozen=True)
class Tradeoff:
    """Measures settings of a run on a data set.

    Attributes:
        run: without merging.
        dataset_name: data set.
        file: JSON that keeps what was measured.
        conditions: settings that the rows depend on; the file keeps them.
        cost_images, max_images: images for tokens, operations and speed; for the scores (None: all).
        boundary: score the boundary IoU as well.
    """

    run: Run
    dataset_name: str
    file: Path
    conditions: Mapping[str, Any]
    cost_images: int
    max_images: int | None = None
    boundary: bool = False

    def measure(self, settings: Iterable[Setting]) -> list[Row]:
        """Score the settings that the file does not hold yet, and time all of them if a speed is missing.

        Returns:
            One dict per setting, in their order: `method`, `options`, `im_size`, `patch_size`; scores in percent
            (`Run.evaluate`); and the entries of `segm.eval.cost.compare`.

        Raises:
            ValueError: the file holds measurements under other conditions, or something else.
        """
        wanted = {setting.key: setting for setting in settings}
        known = self._read()
        how = {"dataset": self._dataset, "n_images": self.max_images, "boundary": self.boundary, "progress": True}
        for key in tqdm([key for key in wanted if key not in known], desc="settings", leave=False):
            known[key] = wanted[key].record | wanted[key].apply_to(self.run).evaluate(**how)
            self._write(known)
        if any("images_per_second" not in known[key] for key in wanted):
            for key, cost in self._costs(wanted).items():  # all together, or they would not compare
                known[key] |= cost
            self._write(known)
        return [known[key] for key in wanted]

    @cached_property
    def _dataset(self) -> SegmentationDataset:
        return self.run.open(name=self.dataset_name)[0]

    @cached_property
    def _settings(self) -> Row:
        return {**self.conditions, "images": fingerprint(self._dataset, dates=False)}

    def _costs(self, settings: Mapping[str, Setting]) -> dict[str, Row]:
        """key -> costs of a setting, against the unpatched model at the same image size."""
        pure = {setting.im_size: Setting(im_size=setting.im_size) for setting in settings.values()}
        every = {one.key: one for one in pure.values()} | dict(settings)
        runs = {key: setting.apply_to(self.run) for key, setting in every.items()}
        views = {size: [*runs[one.key].views(self.dataset_name, self.cost_images)] for size, one in pure.items()}
        return compare(
            {key: run.model for key, run in runs.items()},
            {key: pure[setting.im_size].key for key, setting in settings.items()},
            {key: views[setting.im_size] for key, setting in every.items()},
            self.run.device,
        )

    def _read(self) -> dict[str, Row]:
        if not self.file.exists():
            return {}
        try:
            saved = json.loads(self.file.read_text())
            known = {Setting(*(row[name] for name in Setting().record)).key: row for row in saved["rows"]}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.file} holds no measurements: remove it, or choose another --out") from error
        if saved.get("settings") != json.loads(json.dumps(self._settings, default=list)):
            raise ValueError(
                f"{self.file} was measured with another checkpoint or other settings: choose another --out"
            )
        return known

    def _write(self, known: Mapping[str, Row]) -> None:
        content = {"settings": self._settings, "rows": [*known.values()]}
        write_text(self.file, json.dumps(content, indent=2, default=list) + "\n")
