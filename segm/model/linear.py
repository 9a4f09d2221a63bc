"""Linear layers of float32 that use all of the processor."""

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segm.processor import processor_name

Model = TypeVar("Model", bound=nn.Module)

SMALL = 20480  # numbers: PyTorch convolves so few itself


class ConvolvedLinear(nn.Linear):
    """`nn.Linear`, computed as a convolution of single pixels on a CPU in float32.

    PyTorch gives the products of linear layers to MKL, and convolutions to oneDNN. On processors of AMD, MKL keeps to
    AVX2; oneDNN uses AVX-512 and multiplies twice as fast. The result is that of `nn.Linear` but for rounding.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D')"""
        if not _suits(x, self.weight):
            return super().forward(x)
        pixels = x.reshape(1, 1, -1, self.in_features).permute(0, 3, 1, 2)  # features innermost, as they are
        # In a single row a vertical stride changes nothing; without one, PyTorch does not ask oneDNN on one thread.
        y = F.conv2d(pixels, self.weight[:, :, None, None], self.bias, stride=(2, 1))
        return y.permute(0, 2, 3, 1).reshape(*x.shape[:-1], self.out_features)


def use_whole_processor(model: Model) -> Model:
    """Let the linear layers of a model be `ConvolvedLinear`, in place, if they are faster so on this processor.

    Parameters and the names of the state dict stay. Subclasses of `nn.Linear` stay as they are.

    Returns:
        The model.
    """
    if is_held_back():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = ConvolvedLinear
    return model


def restore_linear(model: Model) -> Model:
    """Undo `use_whole_processor`, in place: what goes by the type, as dynamic quantization, finds `nn.Linear` again.

    Returns:
        The model.
    """
    for module in model.modules():
        if type(module) is ConvolvedLinear:
            module.__class__ = nn.Linear
    return model


def is_held_back() -> bool:
    """Whether PyTorch multiplies with less than the processor has: MKL on AMD, with AVX-512."""
    has_both = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return has_both and torch.backends.cpu.get_cpu_capability() == "AVX512" and "AMD" in processor_name()


def _suits(x: Tensor, weight: Tensor) -> bool:
    """Not where other code is made of it, for which a linear layer shall be one, and not where it gains nothing."""
    if not x.is_cpu or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    return x.dtype == weight.dtype == torch.float32 and x.numel() > SMALL and not torch.is_autocast_enabled("cpu")
