"""Reading YAML files of others: damaged, foreign or hostile ones are refused in one line."""

from pathlib import Path
from typing import Any

import yaml

from segm.errors import one_line

MAX_BYTES, MAX_VALUES = 1 << 20, 50_000


def read_yaml(file: Path, loader: type = yaml.SafeLoader) -> Any:
    """The content of a YAML file, UTF-8, with or without byte-order mark.

    Args:
        file: it has to exist.
        loader: a safe loader of PyYAML.

    Raises:
        ValueError: it is no YAML, or holds tags that the loader does not know; it is bigger than `MAX_BYTES`, or
            stands, with its aliases written out, for more than `MAX_VALUES` values.
    """
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file} has more than {MAX_BYTES >> 20} MiB: it is not a settings file")
    try:
        reader = loader(file.read_bytes().decode("utf-8-sig"))
        node = reader.get_single_node()
        _count(node, {}, set())
        return None if node is None else reader.construct_document(node)
    except OSError:
        raise
    except Exception as error:  # PyYAML's constructors fail with errors of all kinds
        raise ValueError(f"{file} is no readable YAML: {one_line(error)}") from error


def _count(node: Any, known: dict[int, int], within: set[int]) -> int:
    """Values that a node stands for. known: those of nodes that were met; within: the nodes around this one."""
    key = id(node)
    if key in within:
        raise ValueError("a value holds itself")
    if key not in known:
        within.add(key)
        parts = node.value if isinstance(node, yaml.SequenceNode) else ()
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        known[key] = 1 + sum(_count(part, known, within) for part in parts)
        within.remove(key)
        if known[key] > MAX_VALUES:
            raise ValueError(f"with its aliases it holds more than {MAX_VALUES} values")
    return known[key]
