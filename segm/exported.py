"""Exported models: the record in their file, and their predictions in the runtime that it is for.

The file knows what a run directory knows beside its weights, as metadata: `variant.yml`, and what merges inside.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segm.config import BFLOAT16, FLOAT32, OPENVINO_BFLOAT16, SCALES, RunConfig
from segm.errors import one_line
from segm.merging import read_variant
from segm.model.upsample import to_pixels
from segm.precision import Precision, computes_bfloat16
from segm.run import Run
from segm.sizes import Size

SUFFIXES = ONNX, PACKAGE = (".onnx", ".pt2")
KEY = "segm"  # of the metadata
MISSING = "ONNX is not installed: pip install 'g2tm[onnx]'"
RUNTIMES = ONNX_RUNTIME, OPENVINO, INDUCTOR = ("onnxruntime", "openvino", "aotinductor")


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
        batch_size: images that it takes; None: any number, or an older export, of which the graph says so.
        precision: "float32", "float16" or "int8", that of linear layers; None: an older export, which does not say.
    """

    name: str
    variant: Mapping[str, Any]
    im_size: int | None
    size: tuple[int, int]
    output: str
    merging: Mapping[str, Any]
    patch_size: tuple[int, int] = (1, 1)
    checkpoint: str | None = None
    batch_size: int | None = None
    precision: str | None = None

    def dump(self) -> str:
        """As text."""
        return json.dumps(vars(self))

    @classmethod
    def parse(cls, text: str) -> "Record":
        """From text."""
        found = json.loads(text)
        return cls(**found | {key: tuple(found[key]) for key in ("size", "patch_size") if key in found})


@dataclass(frozen=True)
class Session:
    """A file opened in a runtime.

    Attributes:
        run: images (B, 3, H, W), float32, to the graph's output.
        record: see `Record`, as text; None: another program wrote the file.
        batch_size: images that it takes; None: any number.
    """

    run: Callable[[np.ndarray], np.ndarray]
    record: str | None
    batch_size: int | None


class ExportedModel(nn.Module):
    """An exported Segmenter in a runtime, in the place of the real one where images are predicted.

    Args:
        file: from `segm/export_onnx.py`.
        device: CUDA is used where ONNX Runtime has it; OpenVINO computes on the CPU.
        runtime: of `RUNTIMES`; None: that of a package, or ONNX Runtime.
        bfloat16: compute in bfloat16 what the file has in float32; OpenVINO alone can.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another program wrote it, or the runtime is not installed, or cannot compute in bfloat16.
    """

    def __init__(
        self,
        file: str | Path,
        device: torch.device | str = "cpu",
        runtime: str | None = None,
        bfloat16: bool = False,
    ) -> None:
        super().__init__()
        file, own = Path(file), INDUCTOR if Path(file).suffix == PACKAGE else ONNX_RUNTIME
        if (runtime == INDUCTOR) != (own == INDUCTOR) and runtime is not None:
            raise ValueError(f"{file} does not run in {runtime}: {PACKAGE} is for {INDUCTOR}, {ONNX} for the others")
        self.runtime, self.in_bfloat16 = runtime or own, bfloat16
        self.session = open_session(file, torch.device(device), self.runtime, bfloat16)
        if self.session.record is None:
            raise ValueError(f"{file} was not exported by g2tm export: it does not say how it was trained")
        self.record, self.batch_size = Record.parse(self.session.record), self.session.batch_size
        self.patch_size = self.record.patch_size
        self.n_cls = self.record.variant["net_kwargs"]["n_cls"]

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
        return torch.from_numpy(self.session.run(filled.numpy()))[: len(images)]

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
    """A run whose model is an `ExportedModel`; its merging is part of the graph."""

    @property
    def precision_name(self) -> str:
        """That of the file, or bfloat16 if the runtime computes so what the file has in float32."""
        model = cast(ExportedModel, self.model)
        own = model.record.precision or super().precision_name
        own = BFLOAT16 if model.in_bfloat16 and own == FLOAT32 else own
        return f"{OPENVINO}-{own}" if model.runtime == OPENVINO else own

    @property
    def merging(self) -> dict[str, Any]:
        """Method and options in force as `variant.yml` records them."""
        return dict(cast(ExportedModel, self.model).record.merging)

    @property
    def method(self) -> str:
        """Name of the method in force, "pure" for none."""
        return read_variant(self.merging)[0]

    @property
    def options(self) -> dict[str, Any]:
        """The method's options in force."""
        return read_variant(self.merging)[1]


def runtime_of(precision: str) -> dict[str, Any]:
    """Arguments of `open_run` for an exported file of one of the precisions in `segm.config.EXPORTED`."""
    if not precision.startswith(OPENVINO):
        return {"runtime": ONNX_RUNTIME}
    return {"runtime": OPENVINO, "amp": precision == OPENVINO_BFLOAT16 or computes_bfloat16(torch.device("cpu"))}


def check_installed(runtime: str) -> None:
    """Raise a ValueError if a runtime is not installed."""
    if runtime == OPENVINO and find_spec("openvino") is None:
        raise ValueError("OpenVINO is not installed: pip install 'g2tm[openvino]'")
    if runtime == ONNX_RUNTIME and find_spec("onnxruntime") is None:
        raise ValueError(MISSING)


def open_session(file: Path, device: torch.device, runtime: str, bfloat16: bool) -> Session:
    """Open an exported file; arguments and errors as of `ExportedModel`."""
    check_installed(runtime)
    if runtime != OPENVINO and bfloat16:
        raise ValueError(f"{file} runs in the precision that it was exported in: leave --amp out")
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: give a file that g2tm export wrote")
    try:
        if runtime == INDUCTOR:
            return _in_pytorch(file)
        return _in_openvino(file, bfloat16) if runtime == OPENVINO else _in_onnxruntime(file, device)
    except Exception as error:  # the runtimes' own types, which derive from Exception alone
        raise ValueError(f"cannot open {file}: {one_line(error)}") from error


def _in_onnxruntime(file: Path, device: torch.device) -> Session:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.force_spinning_stop", "1")  # PyTorch wants the cores, too
    options.log_severity_level = 3
    wanted = ["CUDAExecutionProvider"] * (device.type == "cuda") + ["CPUExecutionProvider"]
    providers = [name for name in wanted if name in onnxruntime.get_available_providers()]
    session = onnxruntime.InferenceSession(file, options, providers=providers)
    size = session.get_inputs()[0].shape[0]  # a name where it may be any number
    record = session.get_modelmeta().custom_metadata_map.get(KEY)
    return Session(
        lambda images: session.run(None, {"images": images})[0], record, size if isinstance(size, int) else None
    )


def _in_openvino(file: Path, bfloat16: bool) -> Session:
    import openvino

    graph = openvino.Core().read_model(file)
    # By itself it would compute in bfloat16 wherever the processor has it.
    precision = {"INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32"}
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.Core().compile_model(graph, "CPU", precision | hints)
    size = graph.input(0).partial_shape[0]
    record = graph.get_rt_info(["framework", KEY]).astype(str) if graph.has_rt_info(["framework", KEY]) else None
    return Session(lambda images: compiled({0: images})[0], record, size.get_length() if size.is_static else None)


def _in_pytorch(file: Path) -> Session:
    """A package of AOTInductor, which was compiled for the processor that it was made on."""
    package = torch._inductor.aoti_load_package(str(file))

    def run(images: np.ndarray) -> np.ndarray:
        return package(torch.from_numpy(images)).numpy()

    record = package.get_metadata().get(KEY)
    return Session(run, record, None if record is None else json.loads(record).get("batch_size"))


def open_run(
    path: Path,
    *,
    device: torch.device,
    merging: Mapping[str, Any],
    im_size: int | None = None,
    amp: bool | None = None,
    scale: str = SCALES[0],
    window_size: Size | None = None,
    runtime: str | None = None,
) -> Run:
    """A run to predict with: a checkpoint, a run directory, or an exported file.

    Args:
        path, device, merging, im_size, amp, scale, window_size: see `Run.load`; of an exported file the device, the
            scale and, in OpenVINO, `amp` alone can be chosen.
        runtime: of `RUNTIMES`, for an exported file; None: that of a package, or ONNX Runtime.

    Raises:
        FileNotFoundError, ValueError: as `Run.load` and `ExportedModel`.
    """
    if path.suffix not in SUFFIXES:
        if runtime is not None:
            raise ValueError(f"--runtime {runtime}: {path} computes in PyTorch, export it first (g2tm export)")
        size: dict[str, Any] = {"im_size": im_size, "scale": scale, "window_size": window_size}
        return Run.load(path, device=device, merging=merging, amp=amp, **size)
    if merging or im_size or window_size:
        raise ValueError(f"{path} is exported, its merging and sizes are fixed: leave the options out")
    model: Any = ExportedModel(path, device, runtime, bool(amp))
    record = model.record
    config, precision = RunConfig.from_variant(record.variant), Precision.choose(device, False)
    return ExportedRun(record.name, path, model, config, device, precision, record.im_size, scale)
