"""Low-pass filter along the token sequence (Fourier Transformer, ACL 2023): a truncated cosine transform."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from g2tm.reduction import Chain, Reduction
from g2tm.selection import extent, images_in, precise, repeated
from g2tm.validation import check_r


def dct(x: Tensor, *, r: int, keep_mean: bool = False) -> "Truncation":
    """Drop the r highest frequencies of the token sequence.

    The transform is one-dimensional over the raster sequence, line ends included.

    Args:
        x: (B, N, D), patch tokens alone.
        r: number of tokens to remove, at most half of them.
        keep_mean: keep the mean of the sequence, which the published transform scales; see `Truncation`.

    Returns:
        A reduction to N - min(r, N // 2) tokens, which are samples of a resampled sequence and no longer patches.

    Raises:
        ValueError: r is no number of tokens.
    """
    check_r(r)
    n_images, n_tokens = extent(x)
    return Truncation(n_images, n_tokens, n_tokens - min(r, n_tokens // 2), x.device, keep_mean)


class Truncation:
    """Orthonormal DCT-II of length N, truncated to M coefficients, inverse of length M: y = R x with R Rᵀ = I.

    `unmerge` is Rᵀ, so that merge(unmerge(y)) = y, and unmerge(merge(x)) is x without its high frequencies. R
    multiplies a constant sequence by √(N/M) and Rᵀ divides it by that; `unmerge(y, scores=True)` does not divide.

    Args:
        n_images: B.
        n_tokens: N.
        kept: M, from 1 to N.
        device: of `counts` and `sizes`.
        keep_mean: multiply R by √(M/N), and Rᵀ by √(N/M). Both keep a constant then, with or without `scores`, and
            the statements above on merge(unmerge(y)) and unmerge(merge(x)) hold as before.

    Attributes:
        counts, lengths: M for every image.
        padding: None.
        sizes: (B, M), float32, N/M each.
    """

    padding = None

    def __init__(
        self, n_images: int, n_tokens: int, kept: int, device: torch.device | str, keep_mean: bool = False
    ) -> None:
        self.n_tokens, self.kept, self.keep_mean = n_tokens, kept, keep_mean
        self.counts = torch.full((n_images,), kept, device=device)
        self.lengths = tuple(repeated(kept, n_images))

    @property
    def sizes(self) -> Tensor:
        share = self.n_tokens / max(self.kept, 1)
        return torch.full((images_in(self.counts), self.kept), share, dtype=torch.float32, device=self.counts.device)

    def merge(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, M, D), in the dtype of x, computed in at least float32."""
        return _resampled(x, self.kept, self.keep_mean)

    def unmerge(self, y: Tensor, scores: bool = False) -> Tensor:
        """y: (B, M, D) -> (B, N, D); with `scores` or `keep_mean` a constant stays the same constant."""
        return _resampled(y, self.n_tokens, scores or self.keep_mean)

    def then(self, second: Reduction) -> Reduction:
        """This step followed by `second`; two truncations of one kind compose to one."""
        if isinstance(second, Truncation) and second.keep_mean == self.keep_mean:
            return Truncation(images_in(self.counts), self.n_tokens, second.kept, self.counts.device, self.keep_mean)
        return Chain(self, second)


def _resampled(x: Tensor, length: int, keep_constants: bool) -> Tensor:
    """Sequence of another length with the same low frequencies: (B, N, D) -> (B, length, D)."""
    n_tokens = x.shape[1]
    if length == n_tokens:
        return x
    if x.numel() == 0:  # which FFT libraries refuse
        return x.new_zeros(images_in(x), length, x.shape[2])
    with torch.autocast(x.device.type, enabled=False):
        frequencies = F.pad(_frequencies(precise(x)), (0, length - n_tokens))  # a negative number cuts
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
