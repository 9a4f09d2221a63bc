"""Segment photographs and videos that have no labels."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import click
import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from segm.cli import (
    POSITIVE,
    amp_option,
    checkpoint_argument,
    device_option,
    im_size_option,
    runtime_option,
    scale_option,
    window_option,
    workers_option,
)
from segm.data import Photographs
from segm.data.dataset import label_type
from segm.data.images import SUFFIXES, count_suffixes, files_below
from segm.eval.evaluate import Item, read_ahead
from segm.eval.sliding import Windows
from segm.exported import open_run
from segm.merging import MergingCommand
from segm.run import Run
from segm.storage import atomic, write_picture, write_text
from vis import blend, colorize, label_picture

VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".m4v", ".webm")
ENDINGS = (".png", "_colors.png", "_blend.jpg")  # of the results of one photograph
COUNTS = "pixels.json"
LEGEND_ROW = 24  # pixels, at least


@click.command(cls=MergingCommand)
@checkpoint_argument
@click.option(
    "-i",
    "--input",
    "source",
    type=click.Path(path_type=Path),
    required=True,
    help="A folder of photographs, one photograph, or one video.",
)
@click.option("-o", "--output", "target", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
@click.option("--opacity", type=click.FloatRange(0, 1), default=0.5, help="Weight of the labels in the blends, 0 to 1.")
@click.option("--json", "counts_pixels", is_flag=True, help=f"Also write {COUNTS}: the pixels of every class.")
@click.option("--batch-size", type=POSITIVE, metavar="N", default=4, help="Windows of an image per forward pass.")
@amp_option
@im_size_option
@scale_option
@window_option
@runtime_option
@device_option
@workers_option
def main(
    checkpoint: Path,
    source: Path,
    target: Path,
    opacity: float,
    counts_pixels: bool,
    batch_size: int,
    device: torch.device,
    workers: int,
    **how: Any,
) -> None:
    """Segment photographs, or a video, with CHECKPOINT, a file, a run directory or an exported one.

    Writes NAME.png (class indices, 8 bits; 16 for more than 255 classes), NAME_colors.png (in colors, with the names of
    the classes) and NAME_blend.jpg for every photograph NAME; of a video NAME.mp4, its frames with their labels.
    """
    if not source.exists():
        raise FileNotFoundError(f"{source} not found: give a folder of photographs, a photograph or a video")
    if (source if source.is_dir() else source.parent).resolve() == target.resolve():
        raise click.UsageError(
            f"-o {target}: results would overwrite what is there, choose another folder than that of -i"
        )
    run = open_run(checkpoint, device=device, **how)
    job = Job(run, run.choose_windows(batch_size=batch_size), target, opacity)
    if source.suffix.lower() in VIDEOS and source.is_file():
        label_video(job, source)
    else:
        label_photographs(job, source, workers)
    if counts_pixels:
        write_text(target / COUNTS, json.dumps(job.counts, indent=2, ensure_ascii=False))
    if job.damaged:
        raise ValueError(f"{len(job.damaged)} of {job.n_inputs} left out: {'; '.join(job.damaged[:5])}")


@dataclass
class Job:
    """Labels to write.

    Attributes:
        run: that predicts, with these windows.
        target: folder of the results.
        opacity: of the labels in blends, 0 to 1.
        counts: name of a photograph, or "frame N" of a video from 1 -> class -> pixels; classes that occur.
        damaged: a message about each input that was left out.
        n_inputs: number of photographs or frames.
    """

    run: Run
    windows: Windows
    target: Path
    opacity: float

    def __post_init__(self) -> None:
        self.counts: dict[str, dict[str, int]] = {}
        self.damaged: list[str] = []
        self.n_inputs = 0

    def labels(self, name: str, view: Tensor, size: tuple[int, int]) -> np.ndarray:
        """Label map (height, width) of an image that the run preprocessed; its pixels are counted."""
        labels = self.run.predict_preprocessed(view, size, self.windows)
        found, pixels = np.unique(labels, return_counts=True)
        self.counts[name] = {self.run.classes[label]: int(n) for label, n in zip(found, pixels, strict=True)}
        return labels.astype(label_type(self.run.n_cls))

    def blend(self, photo: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """The labels in their colors over the photograph, (H, W, 3), uint8."""
        return blend(photo, colorize(labels, self.run.palette), self.opacity)


def label_photographs(job: Job, source: Path, workers: int) -> None:
    """Label a photograph, or all below a folder.

    Raises:
        FileNotFoundError: there is none.
        ValueError: results of two of them would have one name.
    """
    run = job.run
    photographs = Photographs(source, run.config.data.value_range, run.bands)
    _check_names(photographs)
    job.n_inputs = len(photographs)
    loader = read_ahead(Items(photographs, run.preprocessing), range(len(photographs)), workers, run.device)
    for item in tqdm(loader, desc="inference", unit="image", leave=False):
        if isinstance(item, str):
            job.damaged.append(item)
            continue
        photograph, (view,) = item
        labels = job.labels(photograph.name, view, photograph.image.shape[:2])
        colors = label_picture(labels, run.classes, run.palette, max(LEGEND_ROW, len(labels) // 30))
        for ending, picture in zip(ENDINGS, (labels, colors, job.blend(photograph.photo, labels)), strict=True):
            write_picture(job.target / f"{photograph.name}{ending}", picture)
    done = job.n_inputs - len(job.damaged)
    click.echo(f"{done} photograph{'s' * (done != 1)} segmented, written to {job.target}")
    if source.is_dir() and (others := count_suffixes({*files_below(source)} - {*photographs.files})):
        click.echo(f"not read: {others}; photographs are {', '.join(SUFFIXES)}")


class Items(Dataset):
    """Photographs as `Item`s of one view; in place of one that is damaged, the message that says so."""

    def __init__(self, photographs: Photographs, preprocess: Callable[[np.ndarray], Tensor]) -> None:
        self.photographs, self.preprocess = photographs, preprocess

    def __getitem__(self, index: int) -> Item | str:
        try:
            photograph = self.photographs[index]
        except ValueError as error:
            return str(error)
        return Item(photograph, [self.preprocess(photograph.image)])


def _check_names(photographs: Photographs) -> None:
    """Raise a ValueError unless the names of all results differ."""
    names = Counter(photographs.name_of(index) + end for index in range(len(photographs)) for end in ENDINGS)
    name, count = names.most_common(1)[0]
    if count > 1:
        folder = photographs.folder
        raise ValueError(f"{folder} holds several photographs whose results would be named {name}: rename them")


def label_video(job: Job, file: Path) -> None:
    """Write a video with the labels over its frames, of the same size and rate, without sound.

    Raises:
        ValueError: it is damaged, has no frame, or the run takes other bands than red, green and blue.
    """
    if job.run.bands is not None:
        raise ValueError(f"{file}: the run takes bands {', '.join(map(str, job.run.bands))}, a video has colors alone")
    video = open_video(file)
    out, start = job.target / f"{file.stem}.mp4", time.perf_counter()
    rate, n_told = video.get(cv2.CAP_PROP_FPS) or 25.0, max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)
    first = next(frames_of(video), None)
    if first is None:
        raise ValueError(f"{file}: no frame can be read, it is empty or damaged")
    height, width = (side // 2 * 2 for side in first.shape[:2])  # what codecs take
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic(out) as part:
        encoded = part.with_name(f".{part.name}.mp4")  # OpenCV goes by the ending
        try:
            writer = cv2.VideoWriter(str(encoded), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
            if not writer.isOpened():
                raise ValueError(
                    f"cannot write {out}: OpenCV has no encoder for MP4 here, or the folder is not writable"
                )
            frames = tqdm(chain([first], frames_of(video)), "inference", n_told or None, unit="frame", leave=False)
            for number, frame in enumerate(frames, 1):
                labels = job.labels(f"frame {number}", job.run.preprocessing(frame), frame.shape[:2])
                picture = job.blend(frame, labels)[:height, :width]
                writer.write(np.ascontiguousarray(picture[..., ::-1]))
            writer.release()
            encoded.replace(part)
        finally:
            encoded.unlink(missing_ok=True)
    n_frames, seconds = len(job.counts), time.perf_counter() - start
    job.n_inputs = max(n_told, n_frames)
    click.echo(f"{n_frames} frames segmented, {n_frames / seconds:.2f} frames/s, written to {out}")
    if n_frames < n_told:
        job.damaged.append(f"{file} ends after {n_frames} of {n_told} frames, {out} holds these")


def open_video(file: Path) -> cv2.VideoCapture:
    """A video to read; raises a ValueError if it is none, or damaged."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # it would print on what it finds
    video = cv2.VideoCapture(str(file), cv2.CAP_FFMPEG)
    if not video.isOpened():
        raise ValueError(f"{file} is damaged or no video that OpenCV reads")
    return video


def frames_of(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """The frames that are left, (H, W, 3), uint8, RGB."""
    while True:
        is_read, frame = video.read()
        if not is_read:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


if __name__ == "__main__":
    main()
