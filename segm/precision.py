"""In which precision a model computes, and what that costs of the device's memory."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CPU_INFO = Path("/proc/cpuinfo")  # of Linux


@dataclass
class Precision:
    """Mixed precision: bfloat16 where the device has it, else float16 with a loss scaler; or none.

    Attributes:
        device_type: such as "cpu" or "cuda".
        dtype: that of the forward pass, None for float32.
        scaler: gradient scaler, inactive unless dtype is float16.
    """

    device_type: str
    dtype: torch.dtype | None
    scaler: torch.amp.GradScaler

    @classmethod
    def choose(cls, device: torch.device, amp: bool) -> "Precision":
        """Precision for a device; amp: whether mixed precision is wanted."""
        has_bfloat16 = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = (torch.bfloat16 if has_bfloat16 else torch.float16) if amp else None
        scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        return cls(device.type, dtype, scaler)

    def autocast(self) -> AbstractContextManager[Any]:
        """Context of the forward pass."""
        return nullcontext() if self.dtype is None else torch.autocast(self.device_type, self.dtype)


def has_instructions(device: torch.device, *flags: str) -> bool:
    """Return whether a processor says that it has any of some instructions, such as "avx512_bf16"."""
    if device.type != "cpu" or not CPU_INFO.exists():
        return False
    return any(line.startswith("flags") and {*flags} & {*line.split()} for line in CPU_INFO.read_text().splitlines())


def computes_bfloat16(device: torch.device) -> bool:
    """Return whether a device is fast in bfloat16, which others emulate."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return has_instructions(device, "avx512_bf16", "amx_bf16")


@contextmanager
def fast_float32(device: torch.device) -> Iterator[None]:
    """While open, matrix products of float32 use TF32 on CUDA, as training does not need more.

    Selection stays exact: `g2tm.similarity` computes its products in float64 then.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sum_dtype(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: float64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


def peak_memory(device: torch.device) -> float | None:
    """MiB of the device, on the CPU of the process; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource  # Unix alone has it
    except ModuleNotFoundError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB on Linux
