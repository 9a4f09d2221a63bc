"""Reading and writing files: in one step, so that an interruption leaves the old one; YAML of others with care."""

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

from segm.errors import one_line


def part_of(file: Path) -> Path:
    """The name of a file before it takes its place."""
    return file.with_name(f"{file.name}.part")


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}


@contextmanager
def atomic(file: Path, shared: bool = False) -> Iterator[Path]:
    """A path to write to, which becomes `file` if the block ends well and disappears if not; folders are made.

    Args:
        file: the place of the finished file.
        shared: whether several processes may write it at once; each has a path of its own then, and the last one wins.

    Raises:
        OSError: it cannot be written; names the file.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(file.with_name(f"{file.name}.{uuid.uuid4().hex}") if shared else file)
    part.unlink(missing_ok=True)  # of an earlier run, or a link to somewhere else
    try:
        yield part
        with part.open("rb+") as written:
            os.fsync(written.fileno())  # a name that outlives a power cut while its content does not is worse than none
        part.replace(file)
    except BaseException as error:
        part.unlink(missing_ok=True)
        reason = _own_error(error, part)
        if reason is not None:
            raise OSError(f"cannot write {file}: {reason.strerror}") from error
        raise


def _own_error(error: BaseException | None, part: Path) -> OSError | None:
    """The reason why the file cannot be written, also below a library's error; None: it is another error."""
    while error is not None:
        if isinstance(error, OSError) and (error.errno in FULL or error.filename in (str(part), part)):
            return error
        error = error.__cause__ or error.__context__
    return None


def write_text(file: Path, text: str) -> None:
    """Write a text, UTF-8, in one step."""
    with atomic(file) as part:
        part.write_text(text, encoding="utf-8")


def write_picture(file: Path, picture: np.ndarray) -> None:
    """Write a picture, (H, W, 3) uint8 RGB, or a label map, (H, W) uint8, in one step; raises as `atomic`.

    A link that lies in the way is replaced, not followed.
    """
    # cv2.imwrite ends the program at a name that is no UTF-8.
    _, encoded = cv2.imencode(file.suffix, picture[..., ::-1] if picture.ndim == 3 else picture)
    with atomic(file) as part:
        part.write_bytes(encoded.tobytes())


MAX_BYTES, MAX_VALUES = 1 << 20, 50_000


def read_yaml(file: Path, loader: type = yaml.SafeLoader) -> Any:
    """The content of a YAML file, UTF-8, with or without byte-order mark; `loader`: a safe one of PyYAML.

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
