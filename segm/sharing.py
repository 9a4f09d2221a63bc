"""Runs that others load: a folder with weights in safetensors, `variant.yml` and a model card; local or from a hub."""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors.torch import save_file

from segm.checkpoint import LAST, SHARED
from segm.config import TUNED, VARIANT, Merging, read_tuned
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

| score | percent |
| --- | --- |
{scores}

Images are resized to a shorter side of {image_size} pixels and go through windows of {window} pixels.

Merging: {merging}.
{presets}
```python
from segm.run import Run

run = Run.load("{place}")  # a folder, or the name of a repository on a hub
labels = run.predict("photo.jpg")
```

```
python segm/test.py {place}
python segm/inference.py {place} -i photos -o labelled
```
"""


PRESETS = """
Settings that `segm/tune.py` found on {dataset} and {device}{images}; `Run.load(..., preset="equal")` and
`--preset equal` take them:

| preset | mIoU | boundary IoU | ms per image |
| --- | --- | --- | --- |
{rows}
"""


def save(run: "Run", folder: Path, scores: Mapping[str, Any] | None = None) -> None:
    """Write a run so that others can load it; see `Run.save_pretrained`."""
    if not run.model.state_dict():
        raise ValueError(
            f"{run.name} is an exported model, which has no weights to write: load the run without its preset in int8"
        )
    weights = {name: value.detach().cpu().contiguous() for name, value in run.model.state_dict().items()}
    with atomic(folder / SHARED) as part:
        save_file(weights, part, metadata={"format": "pt"})
    entries = run.merging
    replace(run.config, merging=Merging(entries.pop("patch_type"), entries)).write(folder)
    tuned = read_tuned(run.folder)
    if tuned is not None:
        for name in (TUNED, *(one["file"] for one in tuned["presets"].values() if one.get("file"))):
            with atomic(folder / name) as part:
                shutil.copyfile(run.folder / name, part)
    write_text(folder / "README.md", card(run, folder.name, scores or recorded_scores(run.folder)))


def card(run: "Run", title: str, scores: Mapping[str, Any]) -> str:
    """The model card of a run, Markdown."""
    net, merges = run.config.net, {key: value for key, value in run.merging.items() if value is not None}
    front = {"library_name": "g2tm", "pipeline_tag": "image-segmentation", "datasets": [run.dataset]}
    front["tags"] = ["semantic-segmentation", "vision-transformer", "token-merging", run.method]
    known = [f"| {name} | {scores[key]:.2f} |" for key, name in SCORES.items() if scores.get(key) is not None]
    return CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        title=title,
        place=title,
        backbone=net.backbone,
        decoder=net.decoder,
        dataset=run.dataset,
        n_cls=run.n_cls,
        scores="\n".join(known) or "| not measured | |",
        image_size=run.image_size,
        window=" × ".join(map(str, run.windows.size)),
        merging=", ".join(f"{key} {json.dumps(value)}" for key, value in merges.items()),
        presets=presets_table(run.folder),
    )


def presets_table(folder: Path) -> str:
    """The settings that `segm/tune.py` found for the run in a folder, Markdown; empty where it did not run."""
    content = read_tuned(folder)
    if content is None:
        return ""
    rows = {"without merging": content.get("plain", {})} | {f"`{key}`": one for key, one in content["presets"].items()}
    lines = [
        f"| {name} | {one['mean_iou']:.2f} | {one['boundary_iou']:.2f} | {one['ms']:.0f} |"
        for name, one in rows.items()
    ]
    images = f" ({content['images']})" if "images" in content else ""
    return PRESETS.format(**{**content, "rows": "\n".join(lines), "images": images})


def recorded_scores(folder: Path) -> dict[str, Any]:
    """The best validation scores in the log of a training; empty without one."""
    file = folder / "log.txt"
    entries = read_log(file) if file.is_file() else []
    scored = [entry for entry in entries if entry.get("val_mean_iou") is not None]
    if not scored:
        return {}
    best = max(scored, key=lambda entry: entry["val_mean_iou"])
    return {key: best.get(f"val_{key}") for key in SCORES}


def find(path: str | Path) -> Path:
    """The checkpoint or run directory that a path means: a local one, or the copy of a repository on a hub.

    Raises:
        FileNotFoundError: neither of them is there.
    """
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
