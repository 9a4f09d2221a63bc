"""`torch.compile` for a Segmenter whose merges depend on the image: what is between two merges is one compiled part.

A model whose number of tokens is fixed is one graph under plain `torch.compile`. Here the merge itself runs uncompiled,
since its result decides the shapes of what follows. So that these shapes repeat, and with them the CUDA graphs that are
replayed for each, merged tokens are padded to a multiple of a bucket.
"""

from collections.abc import Callable, Sequence
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from patch.families.base import COMPILATION, RECORD, Patched, PatchedBlock, mix_in, vary
from patch.families.segmenter import is_segmenter
from patch.hooks import are_watched
from patch.layout import Rows
from patch.look import Look

Model = TypeVar("Model", bound=nn.Module)


def compile(
    model: Model, bucket: int = 64, mode: str = "reduce-overhead", backend: str | Callable[..., Any] = "inductor"
) -> Model:
    """Compile a Segmenter with a threshold for inference in place; `patch.remove` undoes it, together with the patch.

    The encoder becomes one part up to the first merge, one from each merge to the next, and one after the last; the
    decoder is another. All are compiled in the first pass that needs them, for any number of tokens, and in the mode
    "reduce-overhead" a CUDA graph is recorded for every bucket that occurs. Upsampling stays as it is, and so does a
    pass in which a hook reads a block (attention maps, similarities). No parameter and no state-dict key
    changes. A copy of the model is compiled too, separately.

    What has run: all of it on the CPU, where there are no CUDA graphs.

    Args:
        model: a patched `segm.model.segmenter.Segmenter` in evaluation mode: patch first, then compile.
        bucket: merged tokens are padded to a multiple of it; it trades the work on padding for fewer CUDA graphs.
        mode: of `torch.compile`, for its inductor backend.
        backend: of `torch.compile`.

    Returns:
        The model. Its passes give no gradients, and refuse to run in training mode with a ValueError. On a GPU, what
        `encoder` and `decoder` themselves return is overwritten by the next pass; what the model returns is not.

    Raises:
        ValueError: a model that plain `torch.compile` compiles as one graph, that is no Segmenter, is in training mode
            or compiled already, or a bucket below 1.
    """
    if not is_segmenter(model):
        raise ValueError(f"cannot compile a {type(model).__name__}: only a Segmenter has the parts, use torch.compile")
    if is_compiled(model):
        raise ValueError("the model is compiled already: call patch.remove first")
    if isinstance(bucket, bool) or not isinstance(bucket, int) or bucket < 1:
        raise ValueError(f"bucket {bucket!r}: give a number of tokens from 1")
    _check_inference(model)
    merging = vars(model)[RECORD].merging if RECORD in vars(model) else None
    if merging is None or merging.method.is_static(merging.options):
        raise ValueError("every image keeps the same number of tokens here: use torch.compile, which makes one graph")
    if merging.method.undo == "encoder":
        raise ValueError(f"{merging.method.name} cannot be compiled: it undoes its merge inside of the encoder")
    if getattr(model, "on_grid", False) or getattr(model, "has_queries", False):
        raise ValueError("a Segmenter whose decoder reads or joins blocks of the encoder cannot be compiled")
    chosen = merging.options
    if chosen.get("after") == "mlp" and chosen.get("metric", "tokens") != "tokens":
        raise ValueError("a merge after the MLP by what attention saw cannot be compiled: give metric='tokens'")
    options = {"backend": backend} | ({"mode": mode} if backend == "inductor" else {})
    own: Any = model
    compilation = Compilation(bucket, options, [own.encoder, own.decoder])
    mix_in(own.encoder, CompiledEncoder, **{COMPILATION: compilation})
    mix_in(own.decoder, CompiledDecoder, **{COMPILATION: compilation})
    return model


def is_compiled(model: nn.Module) -> bool:
    """Return whether `compile` was applied."""
    return is_segmenter(model) and isinstance(model.encoder, CompiledEncoder)


class Compilation:
    """The compiled parts of a model, and how they were made.

    Attributes:
        bucket: see `compile`.
        options: of `torch.compile`.
        modules: encoder and decoder; compiled code would pass hooks in them by.
        parts: of the encoder, once they are compiled.
        decode: of the decoder.
    """

    def __init__(self, bucket: int, options: dict[str, Any], modules: Sequence[nn.Module]) -> None:
        self.bucket, self.options, self.modules = bucket, options, modules
        self.parts: list[Part] | None = None
        self.decode: Callable[[Tensor], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For a copy of the model: compiled functions know the old one."""
        return self.__dict__ | {"parts": None, "decode": None}

    def compiled(self, function: Any) -> Callable[..., Any]:
        """A function of its own for Dynamo, which keeps what it compiled by code object, and stops after a few."""
        code = function.__code__.replace()
        name, defaults, closure = function.__name__, function.__defaults__, function.__closure__
        return torch.compile(FunctionType(code, function.__globals__, name, defaults, closure), **self.options)


class CompiledEncoder(Patched):
    """An encoder whose parts between two merges are compiled."""

    _compilation: Compilation
    blocks: Any

    @torch.no_grad()
    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, P + M, D)"""
        own, merging = self._compilation, self._patch.merging
        _check_inference(self)
        if are_watched(own.modules):
            whole: Any = super()
            return whole.forward_features(images)
        torch.compiler.cudagraph_mark_step_begin()
        if own.parts is None:
            own.parts = [part._replace(run=own.compiled(part.run)) for part in encoder_parts(self)]
        with merging.encoder_pass(self, self.blocks, merging.grid_of(self, images.shape[-2:]), own.bucket) as track:
            track.n_ran = len(self.blocks)  # though none runs as a whole
            x, ropes, look = images, None, None
            for part in own.parts:
                layout = Rows(track.tokens, self.blocks[0]._patch.n_around)
                vary(track.tokens.key_bias, 3)
                vary(layout.bias, 3)
                x, ropes, look = part.run(x, ropes, layout)
                if part.block is not None and len(x):
                    assert part.layer is not None
                    x = track.merge(x, part.block, part.layer, look)
                    vary(x, 1)
            return x


class CompiledDecoder(Patched):
    """A compiled decoder."""

    _compilation: Compilation

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, C)"""
        own = self._compilation
        _check_inference(self)
        if are_watched(own.modules):
            return super().forward(x)
        if own.decode is None:
            whole = super().forward

            def decode(x: Tensor) -> Tensor:
                return whole(x)

            own.decode = own.compiled(decode)
        vary(x, 1)
        return own.decode(x)


class Part(NamedTuple):
    """The work of an encoder between two merges.

    Attributes:
        run: (x, rotary tables, layout) -> (x, rotary tables, look at the last attention); the first part takes images
            and no tables.
        block, layer: where tokens merge behind it; None: at the end.
    """

    run: Callable[[Tensor, Any, Rows], tuple[Tensor, Any, Look | None]]
    block: Any
    layer: int | None


def encoder_parts(encoder: Any) -> list[Part]:
    """The parts of an encoder: one more than there are merges."""
    parts: list[Part] = []
    stages: list[Stage] = []

    def cut(block: Any, layer: int | None) -> None:
        parts.append(Part(_sequence(encoder if not parts else None, stages.copy()), block, layer))
        stages.clear()

    for index, block in enumerate(encoder.blocks):
        halves = {"before": None, "attention": partial(_attend, block, index), "block": partial(_feed, block)}
        for place, half in halves.items():  # in this order, a merge in some of them
            if half is not None:
                stages.append(half)
            if place in block._patch.merges_at:
                cut(block, block._patch.merges_at[place])
    stages.append(lambda x, ropes, layout: (encoder.norm(x), None))
    cut(None, None)
    return parts


Stage = Callable[[Tensor, Any, Rows], tuple[Tensor, Look | None]]


def _sequence(embedded: Any, stages: Sequence[Stage]) -> Callable[[Tensor, Any, Rows], tuple[Tensor, Any, Look | None]]:
    """The stages one after the other; embedded: the encoder, if images come in."""

    def run(x: Tensor, ropes: Any, layout: Rows) -> tuple[Tensor, Any, Look | None]:
        look = None
        if embedded is not None:
            x, ropes = _embed(embedded, x)
        for stage in stages:
            x, look = stage(x, ropes, layout)
        return x, ropes, look

    return run


def _embed(encoder: Any, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Images (B, 3, H, W) -> tokens (B, P + N, D), and the rotary table that each block gets."""
    embedded = encoder._pos_embed(encoder.patch_embed(images))
    x, rope = embedded if isinstance(embedded, tuple) else (embedded, None)  # rotary: `Eva`
    ropes = [*rope] if rope is not None and encoder.rope_mixed else [rope] * len(encoder.blocks)
    return encoder.norm_pre(x), ropes


def _attend(block: PatchedBlock, index: int, x: Tensor, ropes: Any, layout: Rows) -> tuple[Tensor, Look | None]:
    return block.attend(x, layout, ropes[index])


def _feed(block: PatchedBlock, x: Tensor, ropes: Any, layout: Rows) -> tuple[Tensor, Look | None]:
    return block.feed(x, layout), None


def _check_inference(model: nn.Module) -> None:
    if model.training:
        raise ValueError(
            "a compiled model is for inference, training would compile every number of tokens: "
            "call model.eval() first, or patch.remove to train"
        )
