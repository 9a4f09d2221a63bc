"""Where the YAML files of `configs/` are, and how they are read."""

from pathlib import Path
from typing import Any

import yaml

import segm


def config_dir() -> Path:
    """Folder of the YAML files: `segm/configs` in an installed wheel, else `configs` beside `segm`."""
    # The wheel's folder goes first: beside an installed `segm` stands site-packages, where a foreign
    # `configs` may lie.
    packaged = Path(segm.__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parents[1] / "configs"


def load_config(name: str) -> Any:
    """Content of `configs/<name>.yml`; `name` may hold a sub-folder (`recipes/...`).

    Raises:
        ValueError: there is no such file.
    """
    path = config_dir() / f"{name}.yml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yml"))) or "none"
        raise ValueError(f"no configuration {name!r}: {path} does not exist (there: {known})")
    return yaml.safe_load(path.read_text(encoding="utf-8"))
