"""Linear layers of float32 that use all of the processor."""

import platform
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


class OneDNNLinear(nn.Linear):
    """`nn.Linear` that multiplies with oneDNN on a CPU, in float32, where no gradients are asked for.

    PyTorch gives these products to MKL. On processors of AMD, MKL keeps to AVX2; oneDNN uses AVX-512 and multiplies
    twice as fast. The result is that of `nn.Linear` but for rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')"""
        if not _onednn_applies(x, self.weight):
            return super().forward(x)
        # As `torch.compile` does it. PyTorch has no public name for it: a convolution of single pixels goes to oneDNN
        # too, but sorts the weights anew in every pass, which costs a merged ViT-S 8 %.
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def use_onednn_linear(model: Model) -> Model:
    """The model, whose linear layers become `OneDNNLinear`, in place, where that is faster on this processor.

    Parameters, the names of the state dict and subclasses of `nn.Linear` stay.
    """
    if mkl_lacks_avx512():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = OneDNNLinear
    return model


def restore_linear(model: Model) -> Model:
    """The model without `use_onednn_linear`, in place, for code that looks for `nn.Linear`: dynamic quantization."""
    for module in model.modules():
        if type(module) is OneDNNLinear:
            module.__class__ = nn.Linear
    return model


def mkl_lacks_avx512() -> bool:
    """Return whether PyTorch multiplies with MKL on a processor of AMD with AVX-512, of which MKL makes no use."""
    has_both = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AMD" in processor_name()


@cache
def processor_name() -> str:
    """Name of this machine's processor, from Linux or else from Python."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _onednn_applies(x: Tensor, weight: Tensor) -> bool:
    """Not where it is compiled or traced, which takes a plain linear layer, nor for inputs that oneDNN refuses."""
    if not x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return x.dtype == weight.dtype == torch.float32 and x.numel() > 0 and not torch.is_autocast_enabled("cpu")
