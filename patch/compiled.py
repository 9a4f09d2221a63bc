"""`torch.compile` for a Segmenter that merges: everything between two merges is one compiled part.

The merge itself runs uncompiled, since its result decides the shapes of what follows. So that these shapes repeat, and
with them the CUDA graphs that are replayed for each, merged tokens are padded to a multiple of a bucket.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from patch.families import family_of
from patch.families.base import Patched, PatchedBlock, put_in_front
from patch.families.segmenter import is_segmenter
from patch.state import Watchers

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model, bucket: int = 64, mode: str = "reduce-overhead", backend: str | Callable[..., Any] = "inductor"
) -> Model:
    """Compile a Segmenter for inference in place; `patch.remove` undoes it, together with the patch.

    The encoder becomes one part up to the first merge, one from each merge to the next, and one after the last; the
    decoder is another. All are compiled in the first pass that needs them, for any number of tokens, and in the mode
    "reduce-overhead" a CUDA graph is recorded for every bucket that occurs. Upsampling stays as it is, and so does a
    pass in which somebody looks inside by a hook (attention maps, similarities). No parameter and no state-dict key
    changes. A copy of the model is compiled too, separately.

    What has run: all of it on the CPU, where there are no CUDA graphs.

    Args:
        model: a `segm.model.segmenter.Segmenter` in evaluation mode, patched or not; patch first, then compile.
        bucket: merged tokens are padded to a multiple of it; it trades the work on padding for fewer CUDA graphs.
        mode: of `torch.compile`, for its inductor backend.
        backend: of `torch.compile`.

    Returns:
        The model. Its passes give no gradients, and refuse to run in training mode with a ValueError. On a GPU, what
        `encoder` and `decoder` themselves return is overwritten by the next pass; what the model returns is not.

    Raises:
        ValueError: a model that is no Segmenter, is in training mode or compiled already, or a bucket below 1.
    """
    if not is_segmenter(model):
        raise ValueError(f"cannot compile a {type(model).__name__}: only a Segmenter has the parts")
    if is_compiled(model):
        raise ValueError("the model is compiled already: call patch.remove first")
    if isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 1:
        raise ValueError(f"bucket {bucket!r}: give a number of tokens from 1")
    _check_inference(model)
    if hasattr(model, "merging") and model.merging.method.undo == "encoder":
        raise ValueError(f"{model.merging.method.name} cannot be compiled: it undoes its merge inside of the encoder")
    if hasattr(model, "merging") and model.merging.method.place_of(model.merging.options) == "ahead":
        raise ValueError(f"{model.merging.method.name} cannot be compiled in this form: a merge reuses attention")
    if getattr(model, "on_grid", False) or getattr(model, "joins", False):
        raise ValueError("a Segmenter whose decoder reads or joins blocks of the encoder cannot be compiled")
    options = {"backend": backend} | ({"mode": mode} if backend == "inductor" else {})
    watchers = Watchers([*model.encoder.modules(), *model.decoder.modules()])
    compilation = Compilation(bucket, options, watchers, merges=hasattr(model, "merging"))
    put_in_front(model.encoder, CompiledEncoder, compilation=compilation)
    put_in_front(model.decoder, CompiledDecoder, compilation=compilation)
    return model


def is_compiled(model: nn.Module) -> bool:
    """Whether `compile` was applied."""
    return is_segmenter(model) and isinstance(model.encoder, CompiledEncoder)


class Compilation:
    """What `compile` put into a model.

    Attributes:
        bucket: see `compile`.
        options: of `torch.compile`.
        watchers: hooks inside the compiled parts: compiled code would pass them by.
        merges: whether the model is patched.
        parts: of the encoder, once they are compiled.
        decode: of the decoder.
    """

    def __init__(self, bucket: int, options: dict[str, Any], watchers: Watchers, merges: bool) -> None:
        self.bucket, self.options, self.watchers, self.merges = bucket, options, watchers, merges
        self.parts: list[Part] | None = None
        self.decode: Callable[[Tensor], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model: compiled functions know the old one."""
        return self.__dict__ | {"parts": None, "decode": None}

    def compiled(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of its own for Dynamo, which keeps what it compiled by code object, and stops after a few."""
        code = function.__code__.replace()
        name, defaults, closure = function.__name__, function.__defaults__, function.__closure__
        return torch.compile(FunctionType(code, function.__globals__, name, defaults, closure), **self.options)


class CompiledEncoder(Patched):
    """An encoder whose parts between two merges are compiled."""

    ATTRIBUTES = ("compilation",)

    compilation: Compilation

    @torch.no_grad()
    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P + M, D)"""
        own = self.compilation
        _check_inference(self)
        if own.watchers.present():
            whole: Any = super()
            return whole.forward_features(images)
        torch.compiler.cudagraph_mark_step_begin()
        if own.parts is None:
            own.parts = [part._replace(run=own.compiled(part.run)) for part in encoder_parts(self)]
        grid = family_of(self, check=False).grid(self, images.shape[-2:])
        with self.merging.encode(grid, own.bucket) if own.merges else nullcontext() as here:
            x, ropes = images, None
            for run, block, layer in own.parts:
                x, ropes = run(x, ropes)
                if block is not None:
                    x = here.reduce(x, block, layer)
                    _vary(x, 1)
                    _vary(here.key_bias, 3)
            return x


class CompiledDecoder(Patched):
    """A compiled decoder."""

    ATTRIBUTES = ("compilation",)

    compilation: Compilation

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, C)"""
        own = self.compilation
        _check_inference(self)
        if own.watchers.present():
            return super().forward(x)
        if own.decode is None:
            whole = super().forward

            def decode(x: Tensor) -> Tensor:
                return whole(x)

            own.decode = own.compiled(decode)
        if not own.merges:
            return own.decode(x).clone()  # no undoing of a merge copies them
        _vary(x, 1)
        return own.decode(x)


class Part(NamedTuple):
    """What an encoder does between two merges.

    Attributes:
        run: (x, rotary tables) -> the same; the first part takes images and no tables.
        block, layer: where tokens merge behind it; None: at the end.
    """

    run: Callable[[Tensor, Any], tuple[Tensor, Any]]
    block: nn.Module | None
    layer: int | None


def encoder_parts(encoder: nn.Module) -> list[Part]:
    """The parts of an encoder: one more than there are merges."""
    family = family_of(encoder, check=False)
    parts: list[Part] = []
    stages: list[Stage] = []

    def cut(block: nn.Module | None, layer: int | None) -> None:
        embed = None if parts else partial(family.embed, encoder)
        parts.append(Part(_sequence(embed, stages.copy()), block, layer))
        stages.clear()

    for index, block in enumerate(family.blocks(encoder)):
        if not isinstance(block, PatchedBlock):
            stages.append(partial(_own, block, index))
            continue
        halves = {"before": [], "attention": [partial(_attend, block, index)], "block": [partial(_feed, block)]}
        for place, half in halves.items():  # in this order, a merge in some of them
            stages += half
            if place in block.places:
                cut(block, block.places[place])
    stages.append(lambda x, _: encoder.norm(x))
    cut(None, None)
    return parts


Stage = Callable[[Tensor, Any], Tensor]


def _sequence(embed: Callable[..., Any] | None, stages: Sequence[Stage]) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    def run(x: Tensor, ropes: Any) -> tuple[Tensor, Any]:
        if embed is not None:
            x, ropes = embed(x)
        for stage in stages:
            x = stage(x, ropes)
        return x, ropes

    return run


def _attend(block: PatchedBlock, index: int, x: Tensor, ropes: Any) -> Tensor:
    return block.begin(x, block.merging.current, ropes[index])


def _feed(block: PatchedBlock, x: Tensor, _: Any) -> Tensor:
    return block.feed(x, block.merging.current)


def _own(block: nn.Module, index: int, x: Tensor, ropes: Any) -> Tensor:
    return block(x) if ropes[index] is None else block(x, rope=ropes[index])


def _vary(x: Tensor | None, axis: int) -> None:
    """Tell the compiler that a size changes from pass to pass, so that it does not begin with one for this alone."""
    if x is not None and x.shape[axis] > 1:
        torch._dynamo.maybe_mark_dynamic(x, axis)


def _check_inference(model: nn.Module) -> None:
    if model.training:
        raise ValueError(
            "a compiled model is for inference, training would compile every number of tokens: "
            "call model.eval() first, or patch.remove to train"
        )
