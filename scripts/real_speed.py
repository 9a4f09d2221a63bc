"""The whole way from a photograph to its labels: plain PyTorch against runs in all precisions of the processor."""

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from patch.trials import interleaved_trials, speed
from segm.eval.sliding import predict_labels, window_starts
from segm.model.linear import restore_linear
from segm.model.segmenter import Segmenter
from segm.precision import has_instructions
from segm.run import Run

PHOTOS = {"512×512": (512, 512), "2048×1024": (1024, 2048)}  # height, width
REPEATS = 5

Call = Callable[[list[np.ndarray]], Any]


def plain_predict(run: Run, photo: np.ndarray) -> Tensor:
    """Labels of a photograph as one would write it: every window's logits upsampled in float32, averaged, resized.

    Args:
        run: without merging.
        photo: (H, W, 3), uint8.

    Returns:
        (H, W), int64.
    """
    image, (high, wide), stride = run.preprocess(photo), run.windows.size, run.windows.stride
    if image.shape[2] < high or image.shape[3] < wide:
        scale = max(high / image.shape[2], wide / image.shape[3])
        size = [max(int(side * scale), least) for side, least in zip(image.shape[2:], (high, wide), strict=True)]
        image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
    height, width = image.shape[2:]
    total, count = torch.zeros(1, run.n_cls, height, width), torch.zeros(1, 1, height, width)
    for top in window_starts(height, high, stride[0]):
        for left in window_starts(width, wide, stride[1]):
            place = (..., slice(top, top + high), slice(left, left + wide))
            scores = run.model.grid_logits(image[place]).contiguous()
            total[place] += F.interpolate(scores, size=(high, wide), mode="bilinear", align_corners=False)
            count[place] += 1
    full = F.interpolate(total / count, size=photo.shape[:2], mode="bilinear", align_corners=False)
    return full.argmax(1)[0]


class InDtype(nn.Module):
    """A model whose weights are in another dtype; takes and gives float32.

    Args:
        model: is copied.
        dtype: float32, bfloat16, or qint8: linear layers quantized as they are called.
    """

    def __init__(self, model: Segmenter, dtype: torch.dtype) -> None:
        super().__init__()
        self.n_cls = model.n_cls
        self.dtype = torch.float32 if dtype == torch.qint8 else dtype
        if dtype == torch.qint8:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch announces a successor
                own = restore_linear(copy.deepcopy(model))
                self.model = torch.ao.quantization.quantize_dynamic(own, {nn.Linear}, dtype=dtype, inplace=True)
        else:
            self.model = copy.deepcopy(model).to(dtype)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> logits (B, C, H, W)."""
        return self.model(images.to(self.dtype)).float()


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.qint8}


def usable_dtypes() -> dict[str, torch.dtype]:
    """Precisions that the processor has instructions for."""
    needed = {"bfloat16": {"avx512_bf16", "amx_bf16"}, "int8": {"avx512_vnni", "avx_vnni", "amx_int8"}}
    cpu = torch.device("cpu")
    return {name: dtype for name, dtype in DTYPES.items() if name == "float32" or has_instructions(cpu, *needed[name])}


@torch.inference_mode()
def measure_speed(runs: Mapping[str, Run], photo: np.ndarray, max_images: int | None = None) -> list[dict[str, Any]]:
    """Photographs/s and mIoU of plain eager PyTorch and of runs in all precisions, everything interleaved.

    Args:
        runs: name -> run; the first without merging.
        photo: (H, W, 3), uint8; it is resized to the sizes of `PHOTOS`.
        max_images: for the mIoU.

    Returns:
        List of dicts: `name`, `dtype`, `mean_iou`, and photographs/s under the names of `PHOTOS`.
    """
    plain = next(iter(runs.values()))
    plain = replace(plain, model=restore_linear(copy.deepcopy(plain.model)))
    photos = {name: cv2.resize(photo, size[::-1], interpolation=cv2.INTER_CUBIC) for name, size in PHOTOS.items()}
    eager = ("plain PyTorch", "float32")
    calls: dict[tuple[str, str], Call] = {eager: lambda batch: plain_predict(plain, batch[0])}
    scores = {eager: plain.evaluate(n_images=max_images)["mean_iou"]}
    for dtype_name, dtype in tqdm(usable_dtypes().items(), desc="precisions", leave=False):
        for name, run in runs.items():
            model = InDtype(run.model, dtype).eval()
            calls[name, dtype_name] = partial(predict, run, model)
            own: Any = model
            scores[name, dtype_name] = replace(run, model=own).evaluate(n_images=max_images)["mean_iou"]
    trials = {
        name: interleaved_trials(calls, [[sized]], plain.device, repeats=REPEATS, warm=True, progress=True)
        for name, sized in photos.items()
    }
    return [
        {"name": key[0], "dtype": key[1], "mean_iou": scores[key]}
        | {name: rates[key].quantile(0.5).item() for name, rates in trials.items()}
        for key in calls
    ]


@torch.inference_mode()
def in_every_precision(
    runs: Mapping[tuple[int, str], Run], photos: list[np.ndarray], max_images: int | None = None
) -> dict[tuple[int, str, str], dict[str, Any]]:
    """Label maps/s and scores of runs in every precision of the processor, everything interleaved.

    Args:
        runs: (image size, name) -> run.
        photos: (H, W, 3), uint8, that are timed.
        max_images: for the scores.

    Returns:
        (image size, name, precision) -> `images_per_second`, and `scores` as `Run.evaluate` gives them.
    """
    calls: dict[tuple[int, str, str], Call] = {}
    scores = {}
    for dtype_name, dtype in tqdm(usable_dtypes().items(), desc="precisions", leave=False):
        for key, run in tqdm(runs.items(), desc="runs", leave=False):
            model: Any = InDtype(run.model, dtype).eval()
            calls[*key, dtype_name] = partial(predict, run, model)
            scores[*key, dtype_name] = replace(run, model=model).evaluate(n_images=max_images, boundary=True)
    device = next(iter(runs.values())).device
    trials = interleaved_trials(calls, [[photo] for photo in photos], device, warm=True, progress=True)
    return {key: {"images_per_second": speed(trials[key]), "scores": scores[key]} for key in calls}


def predict(run: Run, model: nn.Module, batch: list[np.ndarray]) -> Tensor:
    """Labels of one photograph as by `Run.predict`, with the run's model in another precision."""
    (photo,) = batch
    return predict_labels(model, [(run.preprocess(photo)[0], False)], run.windows, photo.shape[:2])
