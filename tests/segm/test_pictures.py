"""Pictures as files: names and links that people, or strangers, bring."""

import os
from pathlib import Path

import cv2
import numpy as np

from segm.storage import write_picture

PICTURE = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)


def test_names_that_are_no_utf8(tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9.png")
    write_picture(file, PICTURE)
    read = cv2.imdecode(np.frombuffer(file.read_bytes(), np.uint8), cv2.IMREAD_COLOR)
    assert np.array_equal(read[..., ::-1], PICTURE)


def test_links_are_replaced_not_followed(tmp_path):
    outside = tmp_path / "outside.png"
    outside.write_bytes(b"not ours")
    (tmp_path / "out").mkdir()
    for name in ("a.png", "a.png.part"):
        (tmp_path / "out" / name).symlink_to(outside)
    write_picture(tmp_path / "out/a.png", PICTURE)
    assert outside.read_bytes() == b"not ours" and not (tmp_path / "out/a.png").is_symlink()
    assert [path.name for path in Path(tmp_path / "out").iterdir()] == ["a.png"]
