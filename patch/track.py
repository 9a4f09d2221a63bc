"""The record of a patch in a model, and of what merged in one forward pass of it.

`Merging` is the same for all passes and threads of a model. A `Track` belongs to one pass of one thread: what hooks,
other threads and replicas do with the model in the meantime does not touch it.
"""

import logging
import math
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.profiler import record_function

from g2tm import Grouping, Reduction
from g2tm.selection import cached, images_in, is_vmapped, statically_true
from patch.attention import can_pack
from patch.hooks import are_watched
from patch.layout import Around, Packed, Rows, Tokens
from patch.look import Look
from patch.method import Method, ModelShape, Step

logger = logging.getLogger(__name__)

FEW = 0.25  # share of the patch tokens: a pass that leaves fewer is worth a line
AGAIN = "call patch.remove, then patch.apply once more"
UNDO_AT = {"encoder": "before_norm", "decoder": "decoder"}  # of a method without an option that says where


@dataclass
class Ended:
    """The part of a pass that outlives it.

    Attributes:
        reduction: from all patches to the tokens that were left; None: nothing merged.
        steps: layer -> the composed reduction after it.
        track: gives the pass itself while its autograd graph lives; None afterwards.
    """

    reduction: Reduction | None
    steps: dict[int, Reduction]
    track: "Callable[[], Track | None]"


class _Thread(threading.local):
    """The state of one thread: the passes that it is in, the last one that ended, whether it may trace, a function that
    takes the place of the method's own merge, and one that sees what every block gives."""

    def __init__(self) -> None:
        self.passes: list[Track] = []
        self.ended: list[Ended] = []  # one at most: of a compiled pass an attribute would be lost, a list is not
        self.trained: list[Ended] = []  # the last one of the method's soft form
        self.may_trace = False
        self.merge: Callable[[Step], Reduction | None] | None = None
        self.watch: Callable[[int, Tensor], None] | None = None  # gets the index of a block and what it gave

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles of a model: passes stay with the original."""
        return _Thread, ()


@dataclass(eq=False)
class Merging:
    """The patch of one model.

    Attributes:
        method: the `Method`.
        options: those in force; a pass goes on with the ones that it began with.
        shape: what new options are checked against.
        n_prefix: number of prefix tokens of the encoder.
        merging_blocks: indices of the blocks in which tokens merge, counted from 0.
        grid_of: the grid that a ViT is made for, as it is now: (gh, gw).
        rotary_table: see `Family.rotary_table`.
        range_name: what a profiler sees merges as; None: nothing.
        noted: whether the first pass was looked at for how many tokens it leaves.
    """

    method: Method
    options: Mapping[str, Any]
    shape: ModelShape
    n_prefix: int
    merging_blocks: tuple[int, ...]
    grid_of: Callable[..., tuple[int, int]]
    rotary_table: Callable[[Any, tuple[int, int]], Tensor]
    range_name: str | None = None
    noted: bool = False
    thread: _Thread = field(default_factory=_Thread)

    @property
    def current(self) -> "Track | None":
        """The pass that this thread is in; None: it is in none."""
        return self.thread.passes[-1] if self.thread.passes else None

    @property
    def last(self) -> Ended | None:
        """The last pass that this thread ended."""
        return self.thread.ended[-1] if self.thread.ended else None

    @contextmanager
    def start_pass(self, encoder: Any, blocks: Sequence[Any], more_blocks: Sequence[Any] = ()) -> Iterator["Track"]:
        """Start a pass of a model, and end it.

        Args:
            encoder: the ViT, which sets `Track.grid` when it begins.
            blocks: those of the encoder, as they are now.
            more_blocks: patched blocks behind the encoder.

        Raises:
            ValueError: a trace of a method whose merges depend on the image; or blocks that did not run as patched.
        """
        self._check_trace()
        due = self._due(blocks, more_blocks)
        track = Track(self, encoder, blocks, more_blocks, due)
        self.thread.passes.append(track)
        try:
            yield track
            track.n_expected += len(more_blocks)
            track.check_blocks()
            self._note_few(track)
            self.thread.ended[:] = [track.ended()]
            if track.is_soft:
                self.thread.trained[:] = self.thread.ended
        finally:
            self.thread.passes.pop()

    def _note_few(self, track: "Track") -> None:
        """Log once, of the first images, if less than a quarter of their tokens is left; nothing in a graph."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or self.noted:
            return
        if track.reduction is None or track.is_soft:  # whose masks are no merges yet
            return
        counts, n_patches = track.reduction.lengths, math.prod(track.grid or ())
        if not counts:
            return
        self.noted, left = True, sum(counts) / len(counts)
        if left < FEW * n_patches:
            logger.warning(
                "%s leaves %.3g of %d patch tokens of an image, less than a quarter: labels or features may be lost; "
                "give other options or layers to merge less",
                *(self.method.name, left, n_patches),
            )

    @contextmanager
    def encoder_pass(
        self, encoder: Any, blocks: Sequence[Any], grid: tuple[int, int], bucket: int | None = None
    ) -> Iterator["Track"]:
        """The pass of an encoder: that which the model around it has started, or one of its own.

        Args:
            encoder, blocks: see `start_pass`.
            grid: (gh, gw), patches of the images.
            bucket: see `Track`.
        """
        around = self.current
        if around is not None and around.grid is None:
            around.start_encoder(grid, bucket)
            yield around
            return
        with self.start_pass(encoder, blocks) as own:
            own.is_alone = True
            own.start_encoder(grid, bucket)
            yield own

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """While open, this thread may trace or export the model, whose shapes depend on the image."""
        self.thread.may_trace = True
        try:
            yield
        finally:
            self.thread.may_trace = False

    def _due(self, blocks: Sequence[Any], more_blocks: Sequence[Any]) -> list[int]:
        """Indices of the blocks in the order in which they run.

        Raises:
            ValueError: a block that was not there, or elsewhere, when the model was patched.
        """
        depth = self.shape.depth
        due = [*range(len(blocks)), *range(depth, depth + len(more_blocks))]
        for index, block in zip(due, [*blocks, *more_blocks], strict=True):
            own = next((vars(part)["_patch"] for part in block.modules() if "_patch" in vars(part)), None)
            if own is None or own.index != index or own.merging is not self:
                raise ValueError(f"{self.block_name(index)} is not the one that was patched at this place: {AGAIN}")
        return due

    def block_name(self, index: int) -> str:
        """A block in messages."""
        depth = self.shape.depth
        return f"block {index + 1} of the ViT" if index < depth else f"block {index + 1 - depth} of the decoder"

    def _check_trace(self) -> None:
        """Raise a ValueError where a trace would hold the merges of one image for all."""
        if torch.jit.is_tracing() and torch.onnx.is_in_onnx_export():
            raise ValueError(
                "the exporter that traces has no words for merges: torch.onnx.export(model, ..., "
                "dynamo=True, **patch.onnx_options())"
            )
        traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
        if traced and not self.thread.may_trace and not self.method.is_static(self.options):
            raise ValueError(
                f"a trace would freeze how {self.method.name} merges this image: give a method or an option with a "
                "fixed number of tokens (tokens=...), or patch.remove first"
            )


class Track:
    """One forward pass: what merged, and how the tokens lie.

    Attributes:
        options: those in force.
        grid: (gh, gw), patches of the images; None until the encoder begins.
        is_alone: whether the encoder runs by itself, without a model around it.
        outputs_read: indices of the encoder's blocks whose outputs the model reads: these have all patches.
        blocks: those of the encoder, as they are now, and patched ones behind it.
        n_blocks: how many of them are the encoder's.
        n_expected: how many blocks have to run in this pass, the first ones.
        n_ran: how many blocks ran.
        bucket: merged tokens are padded to a multiple of this number, but not beyond what they were before, so that
            shapes repeat; None: they are not.
        reduction: from all patches to the current tokens; None while nothing was merged.
        steps: layer -> the composed reduction after it.
        soft_steps: layer -> what the soft form of the method returned there, in training.
        tokens: the current patch tokens.
        keeps_rows: whether tokens are never concatenated.
        undo_at: where every patch gets its token back: behind so many blocks, or as in the option `restore_at`.
        is_undone: whether every patch has its token back.
        is_soft: whether the training form of the method runs.
        has_grad: whether gradients were recorded.
    """

    def __init__(
        self, merging: Merging, encoder: Any, blocks: Sequence[Any], more_blocks: Sequence[Any], due: Sequence[int]
    ) -> None:
        self.merging, self.encoder, self.options = merging, encoder, merging.options
        self.grid: tuple[int, int] | None = None
        self.is_alone = self.is_undone = False
        self.outputs_read: Collection[int] = ()
        self.n_blocks = self.n_expected = len(blocks)
        self.bucket: int | None = None
        self.keeps_rows = False
        self.reduction: Reduction | None = None
        self.steps: dict[int, Reduction] = {}
        self.soft_steps: dict[int, Reduction] = {}
        self.blocks, self._due = [*blocks, *more_blocks], due
        self._training, self.has_grad = bool(encoder.training), torch.is_grad_enabled()
        self.is_soft = self._training and merging.method.trains_softly(self.options)
        self.tokens = self._tokens(None)
        self._layout: Rows | None = None  # None: tokens in rows, as after a merge
        self._exposed: Tensor | None = None
        self._tables: dict[tuple[int, int], Tensor] = {}
        self.undo_at = self.options.get("restore_at", UNDO_AT[merging.method.undo])
        self.n_ran = 0
        self._kept: Callable[[], Track | None] | None = None

    def start_encoder(self, grid: tuple[int, int], bucket: int | None = None) -> None:
        """The encoder begins: grid: (gh, gw), patches of the images; bucket: see `Track`."""
        self.grid, self.bucket = grid, bucket
        self.tokens = self._tokens(None)

    def arrange(self, x: Tensor, block: Any) -> tuple[Tensor, Rows]:
        """Lay tokens out as a block works on them: concatenated if images differ in their number, no hook looks into a
        block and attention can keep to the images; else in rows."""
        kind = Packed if self._packs(x, block) else Rows
        now, n_around = self._layout, block._patch.n_around
        if type(now) is not kind or now.n_around != n_around:
            x = x if now is None else now.rows(x)
            now = self._layout = kind(self.tokens, n_around)
            x = now.lay(x)
        return x, now

    def _packs(self, x: Tensor, block: Any) -> bool:
        if (
            self.bucket is not None
            or self.keeps_rows
            or self.tokens.soft_masking is not None
            or self.tokens.padding is None
        ):
            return False
        if self._is_watched or not block.attention_is_fused:
            return False
        return can_pack(x, block.attention_dropout if block.training else 0.0)

    @property
    def breaks_graph(self) -> bool:
        """True under `torch.compile` where the image decides how many tokens are left; `patch.compile` has parts of its
        own."""
        compiles = torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()
        return compiles and self.bucket is None and not self.merging.method.is_static(self.options)

    @cached
    def _is_watched(self) -> bool:
        wrapped = any("_patch" not in vars(block) for block in self.blocks)  # what is around a block looks, too
        return wrapped or are_watched(self.blocks)

    def merge_at(self, place: str, x: Tensor, block: Any, look: Look | None = None) -> Tensor:
        """One reduction step, if the method has one at this place of the block.

        Args:
            place: "before", "attention" or "block".
            x: tokens as they lie.
            block: the patched block.
            look: at its attention; None: it has not run.

        Returns:
            The tokens, in rows where they merged.
        """
        layer = block._patch.merges_at.get(place)
        if layer is None:
            return x
        x = self._in_rows(x)
        if images_in(x) == 0:  # no image, nothing to choose from
            return x
        return self.merge(x, block, layer, look)

    def merge(self, x: Tensor, block: Any, layer: int, look: Look | None) -> Tensor:
        """One reduction step; x: (B, P + N, D) -> (B, P + M, D)."""
        before = block._patch.n_around[0]
        self._check_length(x, Rows(self.tokens, block._patch.n_around))
        method = self.merging.method
        if is_vmapped(x) and not method.is_static(self.options):
            raise ValueError(
                f"vmap needs equal shapes, and how many tokens {method.name} leaves depends on the image: give a "
                "method or an option with a fixed number of tokens (tokens=...)"
            )
        with self._range():
            step = self._step(x[:, before:], block, layer, look)
            chosen = method.training_form if self.is_soft else self.merging.thread.merge
            merged = (chosen or method.merge)(step)
            if merged is None:
                return x
            if self.is_soft:
                self.soft_steps[layer] = merged
            merged = self._widened(merged, step.x.shape[1])
            tokens = merged.merge(step.x)
            self._follow(merged, layer, tokens.shape[1])
            return torch.cat([x[:, :before], tokens], dim=1)

    def _check_length(self, x: Tensor, layout: Rows) -> None:
        """Raise a ValueError if tokens, as they lie, are not those that the pass knows of."""
        if self.grid is None:
            raise ValueError("tokens reached a patched block before the embedding of its ViT ran: call the ViT itself")
        if self.reduction is not None and torch.compiler.is_compiling():  # would compile every number anew
            return
        if statically_true(x.shape[1] != layout.length):
            raise ValueError(
                f"an image of {self.grid[0]}×{self.grid[1]} patches has {x.shape[1]} tokens where {layout.length} are "
                "left: a patched model takes no prompts, and no token may be dropped or added on the way"
            )

    def _step(self, x: Tensor, block: Any, layer: int, look: Look | None) -> Step:
        assert self.grid is not None
        return Step(
            x=x,
            grid=self.grid,
            native_grid=self.merging.grid_of(self.encoder),
            n_prefix=self.merging.n_prefix,
            sizes=None if self.reduction is None else self.reduction.sizes,
            padding=self.tokens.padding,
            soft_mask=self.tokens.soft_mask,
            layer=layer,
            depth=self.n_blocks,
            batch=self.options["batch"] or ("uniform" if self._training else "ragged"),
            options=self.options,
            block=block,
            encoder=self.encoder,
            look=look,
        )

    def _widened(self, merged: Reduction, n_tokens: int) -> Reduction:
        """A merge of which the shape repeats, where shapes are to."""
        static = self.merging.method.is_static(self.options)
        if self.bucket is None or static or not isinstance(merged, Grouping):
            return merged
        width = self.bucket * math.ceil(merged.width / self.bucket)
        return merged.widened(min(width, n_tokens))

    def _follow(self, merged: Reduction, layer: int, width: int) -> None:
        """From now on the tokens are those of one more step, which left so many in a row."""
        self.reduction = merged if self.reduction is None else self.reduction.then(merged)
        self.steps[layer] = self.reduction
        self.tokens, self._layout = self._tokens(self.reduction, width, getattr(merged, "mask", None)), None

    def _tokens(self, reduction: Reduction | None, width: int | None = None, soft_mask: Tensor | None = None) -> Tokens:
        width = math.prod(self.grid or ()) if width is None else width
        masking = self.merging.method.soft_masking if self.is_soft else None
        return Tokens(reduction, self.grid, self.options["attention"], soft_mask, masking, width)

    def _in_rows(self, x: Tensor) -> Tensor:
        layout, self._layout = self._layout, None
        return x if layout is None else layout.rows(x)

    def resume(self, x: Tensor, block: Any) -> Tensor:
        """The tokens with which a block begins: where the block before showed all patches, what came of them merges
        again.

        What a hook returned, or what changed the shown tokens in place, goes on so. Unchanged tokens give back exactly
        those that were shown.

        Raises:
            ValueError: it is another block's turn, or these are other tokens.
        """
        self._check_turn(block._patch.index)
        shown, self._exposed = self._exposed, None
        n_around = block._patch.n_around
        if shown is None or self.reduction is None:
            self._check_length(x, self._layout or Rows(self.tokens, n_around))
            return x
        self._check_length(x, Rows(self._tokens(None), n_around))
        before = n_around[0]
        change = x[:, before:] - self.reduction.unmerge(shown)
        return torch.cat([x[:, :before], shown + self.reduction.merge(change)], dim=1)

    def _check_turn(self, index: int) -> None:
        """Raise a ValueError if it is not this block's turn: each runs once in a pass, one after the other."""
        due = self._due[self.n_ran] if self.n_ran < len(self._due) else None
        if index != due:
            name = self.merging.block_name
            raise ValueError(
                f"{name(index)} ran {'once more' if due is None else f'where it was the turn of {name(due)}'}: patched "
                f"blocks run once each, in order; take away what skips or repeats one, or {AGAIN}"
            )
        self.n_ran += 1

    def leave(self, x: Tensor, block: Any) -> Tensor:
        """The output of a block: in rows where something other than a block comes next, with all patches where it is
        looked at."""
        own, before = block._patch, block._patch.n_around[0]
        if self.merging.thread.watch is not None and own.index < self.n_blocks:
            self.merging.thread.watch(own.index, self._all_patches(x, own.n_around))
        is_last = own.index == self.n_blocks - 1
        is_read = block.is_read(self, is_last)
        if self.undo_at == own.index + 1 or (is_last and (is_read or self.undo_at == "before_norm")):
            return self.undo(self._in_rows(x), before)
        if is_last or is_read or own.leaves_rows or self.n_ran == len(self._due):
            x = self._in_rows(x)
        if not is_read or self.reduction is None or self.is_undone:
            return x
        self._exposed = x[:, before:]
        return torch.cat([x[:, :before], self.reduction.unmerge(self._exposed)], dim=1)

    def _all_patches(self, x: Tensor, n_around: Around) -> Tensor:
        """Tokens as they lie -> (B, N, D), every patch with the features of the token that carries it."""
        rows = x if self._layout is None else self._layout.rows(x)
        patches = rows[:, n_around[0] : rows.shape[1] - n_around[1]]
        return patches if self.reduction is None or self.is_undone else self.reduction.unmerge(patches)

    def after_encoder(self, x: Tensor, before: int) -> Tensor:
        """The encoder's output: with all patches, unless a model around it goes on with the tokens that are left."""
        if self.undo_at == "after_norm":
            return self.undo(x, before)
        return self.unmerge(x, before) if self.is_alone and self.undo_at != "none" else x

    @property
    def grid_left(self) -> tuple[int, int] | None:
        """The grid of the tokens that go on to the end; None: all patches do."""
        return self.tokens.smaller_grid if self.undo_at == "none" else None

    def rotary_table(self, table: Tensor | None, index: int) -> Tensor | None:
        """The rotary table of a block: as it is, or where the tokens are a smaller grid, as for an image of that size.

        Args:
            table: of all patches; None: the model has none.
            index: of the block, counted from 0.
        """
        grid = self.tokens.smaller_grid
        if table is None or grid is None:
            return table
        if grid not in self._tables:
            self._tables[grid] = self.merging.rotary_table(self.encoder, grid)
        smaller = self._tables[grid]
        return smaller[index] if smaller.ndim == 4 else smaller

    def unmerge(self, x: Tensor, before: int = 0) -> Tensor:
        """Give every patch its token back: (B, P + M, C) -> (B, P + N, C), after `before` tokens that stay."""
        if self.reduction is None or self.is_undone:
            return x
        self._check_length(x, Rows(self.tokens, (before, 0)))
        with self._range():
            unmerged = self.reduction.unmerge(x[:, before:], scores=True)
            return torch.cat([x[:, :before], unmerged], dim=1) if before else unmerged

    def undo(self, x: Tensor, before: int) -> Tensor:
        """`unmerge`, for good: what follows in this pass sees all patches."""
        x = self.unmerge(x, before)
        self.is_undone, self.tokens, self._layout = True, self._tokens(None), None
        return x

    def release_with(self, output: Any) -> Any:
        """Let a training pass keep its autograd graph as long as an output of the model, and no longer; returns it."""
        if self.soft_steps and not torch.compiler.is_compiling():
            for x in _tensors(output):
                if x.grad_fn is not None:
                    graph: Any = x.grad_fn
                    graph.metadata[self] = self
                    self._kept = ref(self)
        return output

    def ended(self) -> Ended:
        """The part that outlives the pass."""
        self._layout = self._exposed = None
        if self._kept is None:
            return Ended(self.reduction, self.steps, (lambda: self) if self.soft_steps else lambda: None)
        steps = {layer: step.detached() for layer, step in self.steps.items()}
        reduction = None if self.reduction is None else self.reduction.detached()
        return Ended(reduction, steps, self._kept)

    def check_blocks(self) -> None:
        """Raise a ValueError if a block did not run as a patched one, or none is left in which tokens merge."""
        missed = self.n_ran < self.n_expected
        merging = [index for index in self.merging.merging_blocks if index < self.n_blocks]
        if missed or not merging:
            next_name = self.merging.block_name(self._due[self.n_ran]) if missed else ""
            which = f"{next_name} was" if missed else "the blocks in which tokens merge were"
            raise ValueError(
                f"{which} cut off, replaced, or run by a forward that {self.merging.method.name} did not patch: {AGAIN}"
            )

    def _range(self) -> AbstractContextManager[Any]:
        name = self.merging.range_name
        return nullcontext() if name is None else record_function(name)


def _tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in an output of a model."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | Sequence) and not isinstance(output, str):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
