"""Runs that others load: a folder with weights in safetensors, `variant.yml` and a model card; local or from a hub."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import yaml
from safetensors.torch import save_file

from segm.checkpoint import BEST, LAST, SHARED, checkpoint_file, load_checkpoint, weights_digest
from segm.config import SCALES, TUNED, VARIANT, Merging, read_tuned
from segm.errors import one_line
from segm.runlog import read_log
from segm.storage import atomic, write_text

if TYPE_CHECKING:
    from segm.run import Run

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
FILES = [SHARED, VARIANT, TUNED, "tune/*.onnx", "README.md"]
SCORES = {"pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy", "mean_iou": "mIoU"}
CARD = """---
{front}---

# {title}

A [Segmenter](https://arxiv.org/abs/2105.05633), {backbone} with the decoder {decoder}, trained on {dataset} \
({n_cls} classes).

Weights: {weights}.

{scores}

Images are resized to a shorter side of {image_size} pixels and go through windows of {window} pixels.

Merging: {merging}.
{presets}
```python
from {package}.run import Run

run = Run.load("{place}")  # a folder, or the name of a repository on a hub
labels = run.predict("photo.jpg")
```

```
g2tm test {place}
g2tm predict {place} -i photos -o labelled
```
"""


PRESETS = """
Settings that `g2tm tune` found on {dataset} and {device}{images}; `Run.load(..., preset="equal")` and
`--preset equal` take them:

| preset | mIoU | boundary IoU | ms per image |
| --- | --- | --- | --- |
{rows}
"""


def save(run: "Run", folder: Path, scores: Mapping[str, Any] | None = None) -> None:
    """Write a run so that others can load it; see `Run.save_pretrained`."""
    if not run.model.state_dict():
        raise ValueError(
            f"{run.name} is an exported model, which has no weights to write: load the run without its preset"
        )
    as_shared = replace(run, im_size=None, window_size=None, scale=SCALES[0])
    if scores is not None and as_shared != run:
        raise ValueError(
            "a shared run has the sizes of its training: leave the scores out, or load it without im_size, "
            "window_size, scale and preset to measure them"
        )
    weights = {name: value.detach().cpu().contiguous() for name, value in run.model.state_dict().items()}
    origin, tuned = Origin.of(run), own_presets(run)
    with atomic(folder / SHARED) as part:
        save_file(weights, part, metadata={"format": "pt"} | origin.metadata())
    entries = run.merging
    replace(run.config, merging=Merging(entries.pop("patch_type"), entries)).write(folder)
    if tuned is not None:
        for name in (TUNED, *(one["file"] for one in tuned["presets"].values() if one.get("file"))):
            with atomic(folder / name) as part:
                shutil.copyfile(run.folder / name, part)
    scores = recorded_scores(run, origin) if scores is None else scores
    write_text(folder / "README.md", card(as_shared, folder.name, origin, scores, tuned))


class Origin(NamedTuple):
    """The checkpoint whose weights a run has.

    Attributes:
        file: its name; None: the weights are those of no checkpoint, as after a training in memory.
        epoch: the one that had just ended, from 0; None: none had, or the file does not say.
    """

    file: str | None
    epoch: int | None = None

    @classmethod
    def of(cls, run: "Run") -> "Origin":
        """Find it; raises as `load_checkpoint`."""
        checkpoint = load_checkpoint(run.path)
        if weights_digest(checkpoint["model"]) != weights_digest(run.model.state_dict()):
            return cls(None)
        epoch = checkpoint.get("epoch")
        ended = type(epoch) is int and epoch >= 0 and not checkpoint.get("updates")
        return cls(checkpoint_file(run.path).name, epoch if ended else None)

    def metadata(self) -> dict[str, str]:
        """As safetensors hold it."""
        return {key: str(value) for key, value in zip(("checkpoint", "epoch"), self, strict=True) if value is not None}

    def __str__(self) -> str:
        if self.file is None:
            return "of no checkpoint of the training"
        kind = {LAST: ", the last of the training", BEST: ", the best mIoU on the validation images"}.get(self.file, "")
        return f"`{self.file}`{kind}" + ("" if self.epoch is None else f", after epoch {self.epoch + 1}")


def card(
    run: "Run", title: str, origin: Origin, scores: Mapping[str, Any], tuned: Mapping[str, Any] | None = None
) -> str:
    """The model card of a run, Markdown.

    Args:
        run: with the merging of the card.
        title: of the card, also the place that its examples name.
        origin: of the weights.
        scores: of these weights with this merging, percent; empty: not known.
        tuned: content of the run's `tuned.yml`, for these weights; None: there is none.
    """
    net, merges = run.config.net, {key: value for key, value in run.merging.items() if value is not None}
    front = {"library_name": "g2tm", "pipeline_tag": "image-segmentation", "datasets": [run.dataset]}
    front["tags"] = ["semantic-segmentation", "vision-transformer", "token-merging", run.method]
    known = [f"| {name} | {scores[key]:.2f} |" for key, name in SCORES.items() if scores.get(key) is not None]
    table = ["| score, with this merging | percent |", "| --- | --- |", *known]
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=title,
        place=title,
        package=__package__,  # g2tm.segm where it is installed from a wheel
        backbone=net.backbone,
        decoder=net.decoder,
        dataset=run.dataset,
        n_cls=run.n_cls,
        weights=origin,
        scores="\n".join(table) if known else f"Not scored with this setting: `python segm/test.py {title}` does.",
        image_size=run.image_size,
        window=" × ".join(map(str, run.windows.size)),
        merging=", ".join(f"{key} {json.dumps(value)}" for key, value in merges.items()),
        presets="" if tuned is None else presets_table(tuned),
    )


def own_presets(run: "Run") -> Mapping[str, Any] | None:
    """Content of the run's `tuned.yml`; None where there is none, or it was made for other weights."""
    content = read_tuned(run.folder)
    known = None if content is None else content.get("weights")
    return content if known in (None, weights_digest(run.model.state_dict())) else None


def presets_table(content: Mapping[str, Any]) -> str:
    """The settings in a `tuned.yml`, Markdown."""
    rows = {"without merging": content.get("plain", {})} | {f"`{key}`": one for key, one in content["presets"].items()}
    lines = [
        f"| {name} | {one['mean_iou']:.2f} | {one['boundary_iou']:.2f} | {one['ms']:.0f} |"
        for name, one in rows.items()
    ]
    images = f" ({content['images']})" if "images" in content else ""
    return PRESETS.format(**{**content, "rows": "\n".join(lines), "images": images})


def recorded_scores(run: "Run", origin: Origin) -> dict[str, Any]:
    """The validation scores that the training logged for these weights; empty where it did not score them, or merged
    in another way than the run."""
    file = run.folder / "log.txt"
    as_trained = run.with_settings(*run.resolve_merging({})).merging
    if origin.epoch is None or run.merging != as_trained or not file.is_file():
        return {}
    entries = [entry for entry in read_log(file) if entry["epoch"] == origin.epoch]
    if not entries or entries[-1].get("threshold") != as_trained["threshold"]:  # on its way down
        return {}
    return {key: entries[-1].get(f"val_{key}") for key in SCORES}


def find(path: str | Path, checkpoint: str | None = None) -> Path:
    """The checkpoint or run directory that a path means: a local one, or the copy of a repository on a hub.

    Args:
        path: file, folder, or "user/name" of a repository.
        checkpoint: "last" or "best", for that file of a run directory; None: the path as it is.

    Raises:
        FileNotFoundError: neither of them is there.
        ValueError: see `segm.checkpoint.checkpoint_file`.
    """
    found = _local_copy(path)
    return found if checkpoint is None else checkpoint_file(found, checkpoint)


def _local_copy(path: str | Path) -> Path:
    local, name = Path(path), Path(path).as_posix()
    if local.exists() or not HUB_NAME.fullmatch(name) or local.parent.exists() or local.suffix in (".pth", ".onnx"):
        return local
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*FILES, LAST]))
    except Exception as error:  # no network, no such repository: the client has a type for each
        raise FileNotFoundError(
            f"{name}: no such run directory here, and it cannot be fetched from the hub ({one_line(error, 120)})"
        ) from error
