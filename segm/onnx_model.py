"""Exported models: the record in their ONNX file, and their predictions.

The file knows what a run directory knows beside its weights, as metadata: `variant.yml`, and what merges inside.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segm.config import INT8, SCALES, RunConfig
from segm.errors import one_line
from segm.merging import read_variant
from segm.model.upsample import to_pixels
from segm.precision import Precision
from segm.run import Run
from segm.sizes import Size

SUFFIX = ".onnx"
KEY = "segm"  # of the metadata
MISSING = "ONNX is not installed: pip install 'g2tm[onnx]'"


@dataclass(frozen=True)
class Record:
    """Metadata of an exported file.

    Attributes:
        name: of the run.
        variant: content of its `variant.yml`.
        im_size: shorter side that images are resized to, pixels; None: as in training.
        size: (height, width) of the images, pixels; fixed.
        output: "scores", class logits per patch; "logits", per pixel; or "labels", the label map.
        merging: the method inside of the graph and its options, as `variant.yml` records them.
        patch_size: pixels (height, width) of which class logits cover whole multiples, also where the image is no
            multiple; (1, 1): they cover the image as it is.
        checkpoint: name of the file that the weights come from; None: an older export, which does not say.
    """

    name: str
    variant: Mapping[str, Any]
    im_size: int | None
    size: tuple[int, int]
    output: str
    merging: Mapping[str, Any]
    patch_size: tuple[int, int] = (1, 1)
    checkpoint: str | None = None

    def dump(self) -> str:
        """As text."""
        return json.dumps(vars(self))

    @classmethod
    def parse(cls, text: str) -> "Record":
        """From text."""
        found = json.loads(text)
        return cls(**found | {key: tuple(found[key]) for key in ("size", "patch_size") if key in found})


class OnnxModel(nn.Module):
    """An exported Segmenter in ONNX Runtime, in the place of the real one where images are predicted.

    Args:
        file: from `segm/export_onnx.py`.
        device: CUDA is used where ONNX Runtime has it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another program wrote it, or ONNX Runtime is not installed.
    """

    def __init__(self, file: str | Path, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.session = open_session(Path(file), torch.device(device))
        text = self.session.get_modelmeta().custom_metadata_map.get(KEY)
        if text is None:
            raise ValueError(f"{file} was not exported by g2tm export: it does not say how it was trained")
        self.record = Record.parse(text)
        self.patch_size = self.record.patch_size
        self.n_cls = self.record.variant["net_kwargs"]["n_cls"]
        fixed = self.session.get_inputs()[0].shape[0]  # a name where it may be any number
        self.batch_size = fixed if isinstance(fixed, int) else None

    def run(self, images: Tensor) -> Tensor:
        """The graph's output: images (B, 3, H, W), normalized -> see `Record.output`.

        Raises:
            ValueError: images of another size than the graph takes.
        """
        if tuple(images.shape[-2:]) != self.record.size:
            height, width = self.record.size
            raise ValueError(
                f"images of {images.shape[-2]} × {images.shape[-1]} pixels, the exported model takes "
                f"{height} × {width}: export it at another --im-size"
            )
        count = self.batch_size or len(images)
        parts = [self._run(part, count) for part in images.float().cpu().split(max(count, 1))]
        return torch.cat(parts).to(images.device)

    def _run(self, images: Tensor, count: int) -> Tensor:
        """The same for at most `count` images, which blank ones fill up."""
        filled = F.pad(images, (0, 0, 0, 0, 0, 0, 0, count - len(images)))
        (output,) = self.session.run(None, {"images": filled.numpy()})
        return torch.from_numpy(np.asarray(output))[: len(images)]

    def grid_logits(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), normalized -> logits as coarse as the graph gives them, (B, C, h, w).

        Raises:
            ValueError: as `run`, or a graph that gives labels alone.
        """
        if self.record.output == "labels":
            raise ValueError("the exported model gives label maps, whose windows cannot be averaged: --output scores")
        return self.run(images)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), normalized -> logits (B, C, H, W); raises as `grid_logits`."""
        return to_pixels(self.grid_logits(images), images.shape[-2:], self.patch_size)


class ExportedRun(Run):
    """A run whose model is an `OnnxModel`; its merging is part of the graph."""

    @property
    def precision_name(self) -> str:
        """Of a preset "int8", as its path is that of the checkpoint; of a file that of images and output."""
        return super().precision_name if self.path.suffix == SUFFIX else INT8

    @property
    def merging(self) -> dict[str, Any]:
        """Method and options in force as `variant.yml` records them."""
        return dict(cast(OnnxModel, self.model).record.merging)

    @property
    def method(self) -> str:
        """Name of the method in force, "pure" for none."""
        return read_variant(self.merging)[0]

    @property
    def options(self) -> dict[str, Any]:
        """The method's options in force."""
        return read_variant(self.merging)[1]


def open_session(file: Path, device: torch.device) -> Any:
    """A session of ONNX Runtime; raises as `OnnxModel` does."""
    if find_spec("onnxruntime") is None:
        raise ValueError(MISSING)
    import onnxruntime

    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: give a file that g2tm export wrote")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # PyTorch wants the cores, too
    options.log_severity_level = 3
    wanted = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    try:
        return onnxruntime.InferenceSession(file, options, providers=providers)
    except Exception as error:  # ONNX Runtime's own types, which derive from Exception alone
        raise ValueError(f"cannot open {file}: {one_line(error)}") from error


def open_run(
    path: Path,
    *,
    device: torch.device,
    merging: Mapping[str, Any],
    im_size: int | None = None,
    amp: bool | None = None,
    scale: str = SCALES[0],
    window_size: Size | None = None,
) -> Run:
    """A run to predict with: a checkpoint, a run directory, or an exported file.

    Args:
        path, device, merging, im_size, amp, scale, window_size: see `Run.load`; of an exported file the device and the
            scale alone can be chosen.

    Raises:
        FileNotFoundError, ValueError: as `Run.load` and `OnnxModel`.
    """
    if path.suffix != SUFFIX:
        size: dict[str, Any] = {"im_size": im_size, "scale": scale, "window_size": window_size}
        return Run.load(path, device=device, merging=merging, amp=amp, **size)
    if merging or im_size or amp or window_size:
        raise ValueError(f"{path} is exported, its merging, sizes and precision are fixed: leave the options out")
    model: Any = OnnxModel(path, device)
    record = model.record
    config, precision = RunConfig.from_variant(record.variant), Precision.choose(device, False)
    return ExportedRun(record.name, path, model, config, device, precision, record.im_size, scale)
