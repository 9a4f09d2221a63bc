"""Low-pass filter along the token sequence (Fourier Transformer, ACL 2023): a truncated cosine transform."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import Reduction, equal_counts
from g2tm.selection import at_least_float32, batch_and_length, cached, images_in, without_autocast
from g2tm.validation import check_r


def dct(x: Tensor, *, r: int) -> "Truncation":
    """Drop the r highest frequencies of the token sequence.

    The transform is one-dimensional over the raster sequence, line ends included. The N - r tokens that are left are
    samples of a resampled sequence and no longer patches. x, r: see `g2tm`.
    """
    check_r(r)
    n_tokens = batch_and_length(x)[1]
    return Truncation(x, n_tokens, n_tokens - min(r, n_tokens // 2))


class Truncation(Reduction):
    """Orthonormal DCT-II of length N, truncated to M coefficients, inverse of length M: y = R x with R Rᵀ = I.

    `unmerge` is Rᵀ, so that merge(unmerge(y)) = y, and unmerge(merge(x)) is x without its high frequencies. R
    multiplies a constant sequence by √(N/M) and Rᵀ divides it by that; `unmerge(y, scores=True)` does not divide.
    Every token has the size N/M.

    like: (B, ...), for the number of images and the device; n_tokens, kept: N, and M, from 1 to N.
    """

    def __init__(self, like: Tensor, n_tokens: int, kept: int) -> None:
        self.n_tokens, self.kept = n_tokens, kept
        self.counts, self.lengths = equal_counts(like, kept)

    @cached
    def sizes(self) -> Tensor:
        share = self.n_tokens / max(self.kept, 1)
        return torch.full((images_in(self.counts), self.kept), share, dtype=torch.float32, device=self.counts.device)

    def merge(self, x: Tensor) -> Tensor:
        return _resampled(x, self.kept)

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """y: (B, M, D) -> (B, N, D); with `scores` a constant stays the same constant."""
        return _resampled(y, self.n_tokens, scores)

    def then(self, second: Reduction) -> Reduction:
        """This step followed by `second`; two truncations compose to one."""
        if isinstance(second, Truncation):
            return Truncation(self.counts, self.n_tokens, second.kept)
        return super().then(second)


def _resampled(x: Tensor, length: int, keep_constants: bool = False) -> Tensor:
    """Sequence of another length with the same low frequencies: (B, N, D) -> (B, length, D)."""
    n_tokens = x.shape[1]
    if length == n_tokens:
        return x
    if x.numel() == 0:  # which FFT libraries refuse
        return x.new_zeros(images_in(x), length, x.shape[2])
    with without_autocast(x):
        frequencies = F.pad(_frequencies(at_least_float32(x)), (0, length - n_tokens))  # a negative number cuts
        if keep_constants:
            frequencies = frequencies * math.sqrt(length / n_tokens)
        return _samples(frequencies).to(x.dtype)


def _frequencies(x: Tensor) -> Tensor:
    """Orthonormal DCT-II over the tokens: (B, N, D) -> (B, D, N).

    One real FFT of the even positions followed by the odd ones in reverse (Makhoul, 1980) gives coefficient k as the
    real part of a number, and coefficient N - k as its negative imaginary part.
    """
    n_tokens = x.shape[1]
    folded = torch.cat([x[:, ::2], x[:, 1::2].flip(1)], 1).transpose(1, 2).contiguous()
    spectrum = torch.fft.rfft(folded, norm="ortho") * _rotation(x, n_tokens, -1)
    high = spectrum.imag[..., 1 : (n_tokens + 1) // 2].flip(-1)
    frequencies = torch.cat([spectrum.real, -high], -1) * math.sqrt(2)
    return torch.cat([spectrum.real[..., :1], frequencies[..., 1:]], -1)


def _samples(frequencies: Tensor) -> Tensor:
    """Inverse of `_frequencies`: (B, D, N) -> (B, N, D)."""
    n_images, width, n_tokens = frequencies.shape
    half, n_even = n_tokens // 2 + 1, (n_tokens + 1) // 2
    real = torch.cat([frequencies[..., :1] * math.sqrt(2), frequencies[..., 1:]], -1) / math.sqrt(2)
    mirrored = F.pad(real[..., 1:].flip(-1), (1, 0))  # coefficient N - k at place k; there is none of N
    spectrum = torch.complex(real[..., :half], -mirrored[..., :half]) * _rotation(frequencies, n_tokens, 1)
    folded = torch.fft.irfft(spectrum, n=n_tokens, norm="ortho").transpose(1, 2)
    x = folded.new_empty(n_images, n_tokens, width)
    x[:, ::2], x[:, 1::2] = folded[:, :n_even], folded[:, n_even:].flip(1)
    return x


def _rotation(like: Tensor, n_tokens: int, sign: int) -> Tensor:
    """exp(± iπk / 2N) for k from 0 to N // 2: (N // 2 + 1,), complex, of the precision of `like`."""
    angle = torch.arange(n_tokens // 2 + 1, dtype=like.dtype, device=like.device) * (sign * math.pi / (2 * n_tokens))
    return torch.polar(torch.ones_like(angle), angle)
