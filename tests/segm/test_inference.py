"""Photographs and videos without labels: what is written, and what is refused."""

import json
import shutil

import cv2
import numpy as np
import pytest

from segm import inference
from segm.run import Run

CPU = ["--device", "cpu"]


@pytest.fixture
def photo(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (40, 72, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    cv2.imwrite(str(tmp_path / "in/a.png"), picture)
    return tmp_path / "in/a.png"


@pytest.fixture
def video(tmp_path):
    (tmp_path / "in").mkdir(exist_ok=True)
    return write_video(tmp_path / "in/clip.mp4", 6)


def write_video(file, n_frames):
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"mp4v"), 10, (48, 32))
    for frame in np.random.default_rng(0).integers(0, 256, (n_frames, 32, 48, 3), dtype=np.uint8):
        writer.write(frame)
    writer.release()
    return file


def test_one_photograph_is_segmented(shapes_run, photo, tmp_path, call):
    out = call(inference, shapes_run, "-i", photo, "-o", tmp_path / "out", "--json", "--batch-size", 1, "--amp", *CPU)
    assert "1 photograph segmented" in out
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        "a.png",
        "a_colors.png",
        "a_blend.jpg",
        "pixels.json",
    }
    run, labels = Run.load(shapes_run, device="cpu"), cv2.imread(str(tmp_path / "out/a.png"), cv2.IMREAD_UNCHANGED)
    counts = json.loads((tmp_path / "out/pixels.json").read_text(encoding="utf-8"))["a"]
    assert counts == {run.classes[one]: int((labels == one).sum()) for one in np.unique(labels)}
    colors = cv2.imread(str(tmp_path / "out/a_colors.png"))[..., ::-1]
    assert np.array_equal(colors[:40, :72], run.palette[labels]) and colors.shape[1] > 72  # the legend is beside it


def test_results_do_not_overwrite_one_another(shapes_run, photo, tmp_path, refused):
    shutil.copy(photo, photo.with_name("a_colors.png"))
    assert "named a_colors.png: rename" in refused(
        inference, shapes_run, "-i", photo.parent, "-o", tmp_path / "o", *CPU
    )
    photo.with_name("a_colors.png").rename(photo.with_name("a.bmp"))
    assert "rename them" in refused(inference, shapes_run, "-i", photo.parent, "-o", tmp_path / "o", *CPU)
    assert "overwrite" in refused(inference, shapes_run, "-i", photo, "-o", photo.parent, *CPU)
    assert not (tmp_path / "o").exists()


def test_a_video_is_segmented(shapes_run, video, tmp_path, call):
    out = call(inference, shapes_run, "-i", video, "-o", tmp_path / "out", "--json", *CPU)
    assert "6 frames segmented" in out and "frames/s" in out
    found = cv2.VideoCapture(str(tmp_path / "out/clip.mp4"))
    assert [found.get(one) for one in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)] == [48, 32]
    assert found.get(cv2.CAP_PROP_FPS) == 10 and len([*inference.frames_of(found)]) == 6
    counts = json.loads((tmp_path / "out/pixels.json").read_text(encoding="utf-8"))
    assert len(counts) == 6 and sum(counts["frame 6"].values()) == 48 * 32
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"clip.mp4", "pixels.json"}


def test_videos_that_break_are_named_in_one_line(shapes_run, video, tmp_path, refused):
    data = video.read_bytes()
    for name, content in (("text.mp4", b"no video"), ("empty.mp4", b""), ("cut.mp4", data[: len(data) // 2])):
        (tmp_path / name).write_bytes(content)
        assert name in refused(inference, shapes_run, "-i", tmp_path / name, "-o", tmp_path / "out", *CPU)
    assert "none.mp4" in refused(
        inference, shapes_run, "-i", write_video(tmp_path / "none.mp4", 0), "-o", tmp_path / "o"
    )
    assert not [*tmp_path.glob("o*/*.mp4")] and not [*tmp_path.glob("o*/.*")]


def test_a_video_whose_end_is_missing_is_segmented_up_to_there(shapes_run, tmp_path, refused):
    """An AVI whose index comes last: its header tells more frames than are there."""
    file = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(file), cv2.VideoWriter.fourcc(*"MJPG"), 10, (48, 32))
    for frame in np.random.default_rng(0).integers(0, 256, (8, 32, 48, 3), dtype=np.uint8):
        writer.write(frame)
    writer.release()
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 6 // 10])
    error = refused(inference, shapes_run, "-i", file, "-o", tmp_path / "out", *CPU)
    assert "ends after" in error and "of 8 frames" in error
    n_frames = len([*inference.frames_of(cv2.VideoCapture(str(tmp_path / "out/clip.mp4")))])
    assert 0 < n_frames < 8
