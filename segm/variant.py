"""`variant.yml`: the settings of a run, in the format of Segmenter. Values are checked where the file is read."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from segm.errors import brief
from segm.files import write_text
from segm.yaml_files import read_yaml

VARIANT = "variant.yml"
MOST = 1 << 16  # of pixels, channels, images
MOST_LAYERS, MOST_CLASSES = 512, 255


class _VariantLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also knows tuples: released files hold `!!python/tuple`, and no other tag."""


_VariantLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)


@dataclass(frozen=True)
class Kind:
    """What a value has to be: in words, and whether one is."""

    words: str
    fits: Callable[[Any], bool]


def _whole(low: int, high: int = MOST) -> Kind:
    return Kind(f"a whole number from {low} to {high}", lambda value: type(value) is int and low <= value <= high)


def _number(low: float, high: float = math.inf) -> Kind:
    words = f"a number from {low:g}" + (f" to {high:g}" if high < math.inf else "")
    return Kind(words, lambda value: type(value) in (int, float) and low <= value <= high and abs(value) < 1e15)


def _sides(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) else [value, value]
    return len(sides) == 2 and all(SIZE.fits(side) for side in sides)


def _range(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(RATE.fits(one) and one > 0 for one in value)


def _classes(value: Any) -> bool:
    """Entries of `classes`: a name, and a color of three numbers from 0 to 255."""
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("color"), list)
        and len(entry["color"]) == 3
        and all(type(part) is int and 0 <= part <= 255 for part in entry["color"])
        for entry in value
    )


def _inventory(value: Any) -> bool:
    """Split -> what `segm.data.inventory` records of it."""
    return isinstance(value, dict) and all(isinstance(name, str) and _split(found) for name, found in value.items())


def _split(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    pixels, notes = found.get("pixels"), found.get("notes")
    numbers = [found.get(key) for key in ("images", "masks_counted", "ignored_pixels")]
    sides = [found.get(key) for key in ("smallest", "largest")]
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and all(isinstance(side, list) and len(side) == 2 and all(map(SIZE.fits, side)) for side in sides)
        and isinstance(pixels, dict)
        and all(isinstance(name, str) and type(count) is int and count >= 0 for name, count in pixels.items())
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes)
    )


SIZE, COUNT, SHARE, RATE = _whole(1), _whole(0, 1 << 31), _number(0, 1), _number(0)
N_CLASSES, N_LAYERS = _whole(1, MOST_CLASSES), _whole(1, MOST_LAYERS)
TEXT = Kind("a text", lambda value: isinstance(value, str) and bool(value.strip()))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
SIDES = Kind("a whole number from 1, or two of them", _sides)
CLASSES = Kind("a list of {name, color: [r, g, b]}", _classes)
RANGE = Kind("two numbers above 0", _range)
INVENTORY = Kind("what a training records of its data", _inventory)

# Section -> key -> kind; "" is the file itself. Null stands for a default everywhere. Options of a merging method are
# checked by its own table, keys that are not listed mean nothing to us.
DECODER = {
    "name": TEXT,
    "n_cls": N_CLASSES,
    "n_layers": N_LAYERS,
    "n_blocks": N_LAYERS,
    "dropout": SHARE,
    "drop_path_rate": SHARE,
}
KINDS: dict[str, dict[str, Kind]] = {
    "": {
        **dict.fromkeys(("net_kwargs", "dataset_kwargs", "inference_kwargs"), MAPPING),
        **dict.fromkeys(("optimizer_kwargs", "algorithm_kwargs"), MAPPING),
        "amp": FLAG,
        "seed": COUNT,
        "world_batch_size": SIZE,
    },
    "net_kwargs": {
        "backbone": TEXT,
        "decoder": MAPPING,
        "reduction": MAPPING,
        "normalization": TEXT,
        "distilled": FLAG,
        "n_cls": N_CLASSES,
        "n_layers": N_LAYERS,
        "image_size": SIDES,
        **dict.fromkeys(("patch_size", "d_model", "n_heads"), SIZE),
        **dict.fromkeys(("dropout", "drop_path_rate"), SHARE),
    },
    "net_kwargs.decoder": DECODER,
    "dataset_kwargs": {
        **dict.fromkeys(("dataset", "normalization", "patch_type"), TEXT),
        **dict.fromkeys(("image_size", "batch_size"), SIZE),
        "crop_size": SIDES,
        "scale_range": RANGE,
        "num_workers": COUNT,
        "classes": CLASSES,
        "inventory": INVENTORY,
    },
    "inference_kwargs": {"im_size": SIZE, **dict.fromkeys(("window_size", "window_stride"), SIDES)},
    "optimizer_kwargs": {
        **dict.fromkeys(("opt", "sched"), TEXT),
        **dict.fromkeys(("lr", "min_lr", "weight_decay", "start_factor"), RATE),
        "warmup_epochs": COUNT,
    },
    "algorithm_kwargs": {**dict.fromkeys(("num_epochs", "eval_freq", "batch_size"), SIZE), "cache_features": COUNT},
}


def variant_file(path: str | Path) -> Path:
    """The `variant.yml` (or `variant.yaml`) beside a checkpoint or in a run directory.

    Raises:
        FileNotFoundError: neither is there.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    candidates = [folder / name for name in (VARIANT, "variant.yaml")]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise FileNotFoundError(f"no {VARIANT} in {folder}: it belongs beside the checkpoint")
    return file


def read_variant(path: str | Path) -> dict[str, Any]:
    """Read the `variant.yml` (or `variant.yaml`) beside a checkpoint or in a run directory.

    Raises:
        FileNotFoundError: neither is there.
        ValueError: no YAML of a bounded size, a tag other than `!!python/tuple`, no `net_kwargs` in it, or a value of
            another kind than `KINDS` says.
    """
    file = variant_file(path)
    variant = read_yaml(file, _VariantLoader)
    if not isinstance(variant, dict) or not isinstance(variant.get("net_kwargs"), dict):
        raise ValueError(f"{file} has no net_kwargs")
    for section, kinds in KINDS.items():
        values: Any = variant
        for name in filter(None, section.split(".")):
            values = values.get(name) or {}
        for key, kind in kinds.items():
            if values.get(key) is not None and not kind.fits(values[key]):
                where = f"{key} in {section}" if section else key
                raise ValueError(f"{file}: {where} is {brief(values[key])}, it should be {kind.words}")
    return {key: value for key, value in variant.items() if key not in KINDS[""] or value is not None}


def recorded_grid(path: str | Path, patch_sides: Sequence[int]) -> tuple[int, int] | None:
    """Patches per side (gh, gw) that a run was trained with: their number alone does not tell 18×32 from 24×24.

    Args:
        path: a run directory, or a file in it.
        patch_sides: height and width of a patch, pixels; () if they are not known.

    Returns:
        The grid, or None where no `variant.yml` says it.

    Raises:
        ValueError: as `read_variant`.
    """
    try:
        size = read_variant(path)["net_kwargs"].get("image_size")
    except FileNotFoundError:
        return None
    if size is None or len(patch_sides) != 2:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height // patch_sides[0], width // patch_sides[1]


def write_variant(variant: dict[str, Any], folder: str | Path) -> None:
    """Write `variant.yml` into a run directory, in plain YAML."""
    write_text(Path(folder) / VARIANT, yaml.safe_dump(variant, sort_keys=True))
