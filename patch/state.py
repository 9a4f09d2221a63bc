"""What a patch put into a model, and what one forward pass knows.

`Merging` is the same for all passes and threads of a model. A `Pass` belongs to one pass of one thread: what hooks,
other threads and replicas do with the model in the meantime does not touch it.
"""

import math
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from g2tm import Grouping, Reduction, attention_bias, attention_means, attention_row
from g2tm.selection import images_in
from patch.attention import KeyBias, Masked, carries
from patch.method import Method, Step, Target
from patch.packing import Packing


@dataclass(eq=False)
class Merging:
    """What a patch put into one model.

    Attributes:
        method: the `Method`.
        options: those in force; a pass goes on with the ones that it began with.
        target: what new options are checked against.
        prefix: number of prefix tokens of the encoder.
        watchers: the hooks inside the blocks.
        range_name: what a profiler sees merges as; None: nothing.
    """

    method: Method
    options: Mapping[str, Any]
    target: Target
    prefix: int
    watchers: "Watchers"
    range_name: str | None = None
    _thread: "_Thread" = field(default_factory=lambda: _Thread())

    @property
    def current(self) -> "Pass | None":
        """The pass that this thread is in; None: it is in none."""
        return self._thread.passes[-1] if self._thread.passes else None

    @property
    def last(self) -> "Pass | None":
        """The last pass that this thread finished."""
        return self._thread.last

    @property
    def watched(self) -> bool:
        """Whether somebody looks into a block."""
        # A trace, in which operations are counted, puts hooks on all modules, but does not look at tokens.
        return self.watchers.present() and not torch.jit.is_tracing()

    @contextmanager
    def open_pass(self) -> Iterator["Pass"]:
        """Begin a pass of the whole model, and end it; the encoder in it tells the grid."""
        self._thread.passes.append(Pass(self))
        try:
            yield self._thread.passes[-1]
            self._thread.last = self._thread.passes[-1]
        finally:
            self._thread.passes.pop()

    def begin(self, grid: tuple[int, int]) -> None:
        """Begin a pass of an encoder that no function is around; one that an error has left open is forgotten.

        Args:
            grid: (gh, gw), patches of the images.
        """
        self._check_trace()
        new = Pass(self)
        new.grid, new.alone = grid, True
        self._thread.passes[:] = [new]

    def end(self) -> None:
        """End the pass that `begin` began."""
        self._thread.last = self._thread.passes.pop()

    @contextmanager
    def encode(self, grid: tuple[int, int], bucket: int | None = None) -> Iterator["Pass"]:
        """The pass of an encoder: that which the model around it has begun, or one of its own.

        Args:
            grid: (gh, gw), patches of the images.
            bucket: see `Pass`.
        """
        self._check_trace()
        around = self.current
        if around is not None and around.grid is None:
            around.grid, around.bucket = grid, bucket
            yield around
            return
        with self.open_pass() as own:
            own.grid, own.bucket, own.alone = grid, bucket, True
            yield own

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """While open, this thread may trace or export the model, whose shapes depend on the image."""
        self._thread.tracing = True
        try:
            yield
        finally:
            self._thread.tracing = False

    def _check_trace(self) -> None:
        """Raise a ValueError where a trace would hold the merges of one image for all."""
        traced = torch.jit.is_tracing() or torch.compiler.is_exporting()
        free = self.method.is_static(self.options) and self.method.traceable
        if traced and not self._thread.tracing and not free:
            raise ValueError(
                f"a trace would freeze how {self.method.name} merges this image: give a method or an option with a "
                "fixed number of tokens (tokens=...), or patch.remove first"
            )


class _Thread(threading.local):
    """What a thread knows: the passes that it is in, the last one that it finished, and whether it may trace."""

    def __init__(self) -> None:
        self.passes: list[Pass] = []
        self.last: Pass | None = None
        self.tracing = False

    def __reduce__(self) -> tuple[Any, ...]:
        """For copies and pickles of a model: passes stay with the original."""
        return _Thread, ()


class Pass:
    """What one forward pass knows of its tokens.

    Attributes:
        merging: what the patch put into the model.
        options: those in force.
        grid: (gh, gw), patches of the images; None until the encoder begins.
        encoder: the ViT, where it has learned parts of its own; else None.
        alone: whether the encoder runs by itself, without a model around it.
        reads: indices of the blocks whose outputs have all patches.
        finished: whether every patch has its token back.
        bucket: merged tokens are padded to a multiple of this number, but not beyond what they were before, so that
            shapes repeat; None: they are not.
        reduction: from all patches to the current tokens; None while nothing was merged.
        steps: layer -> the composed reduction after it.
        step: the last one alone.
        packing: how the tokens of all images are concatenated at the moment; None: each image has its row.
        key_bias: (B, 1, 1, M), what is added to the logits of the patch tokens as keys; None: nothing.
        soft_steps: layer -> what the soft form of the method returned there, in training.
        alive: (B, M), the mask of the last of them; None: it has none.
    """

    def __init__(self, merging: Merging) -> None:
        self.merging = merging
        self.options = merging.options
        self.grid: tuple[int, int] | None = None
        self.encoder: nn.Module | None = None
        self.alone = False
        self.reads: set[int] = set()
        self.finished = False
        self.bucket: int | None = None
        self.reduction: Reduction | None = None
        self.steps: dict[int, Reduction] = {}
        self.packing: Packing | None = None
        self._padding: Tensor | None = None
        self.key_bias: Tensor | None = None
        self.soft_steps: dict[int, Reduction] = {}
        self.alive: Tensor | None = None
        self.step: Reduction | None = None
        self._ahead: Tensor | None = None
        self._seen: dict[str, Tensor] = {}
        self._representatives: Tensor | None = None
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._shown: tuple[Tensor, Tensor] | None = None

    def show(self, x: Tensor, prefix: int) -> Tensor:
        """What a hook on a block gets to see of merged tokens: one for every patch, (B, P + N, D)."""
        whole = self.unmerge(x if self.packing is None else self.packing.unpack(x), prefix)
        self._shown = whole, x
        return whole

    def hidden(self, x: Tensor) -> Tensor:
        """The tokens with which the next block goes on: those that were shown as `x`."""
        shown, self._shown = self._shown, None
        return x if shown is None or shown[0] is not x else shown[1]

    def see(self, **found: Tensor) -> None:
        """Keep what a method needs of a block until its merge.

        found: of `Step`, (B, L, D) or, packed, (1, T, D) each.
        """
        self._seen |= found if self.packing is None else {name: self.packing.unpack(x) for name, x in found.items()}

    def see_map(
        self, query: Tensor, key: Tensor, scale: float, needs: Collection[str], neighbors: tuple[int, int]
    ) -> None:
        """Keep what a method needs of an attention map, which is `row` or `means` of `Step`.

        Args:
            query, key: (B, H, L, d) or, packed, (1, H, T, d), as they are multiplied.
            scale: of their products.
            needs: which of the two; other words do not count.
            neighbors: tokens in front of and behind the patch tokens.
        """
        if self.packing is not None:
            query, key = (self.packing.unpack(x.transpose(1, 2)).transpose(1, 2) for x in (query, key))
        bias = None if self.key_bias is None else F.pad(self.key_bias, neighbors)
        for name, summary in (("row", attention_row), ("means", attention_means)):
            if name in needs:
                self._seen[name] = summary(query, key, bias=bias, scale=scale)

    def keep_ahead(self, mask: Tensor) -> None:
        """Keep the mask with which the next attention reuses that of the tokens before a merge."""
        self._ahead = mask

    def take_ahead(self) -> Tensor | None:
        """That mask, once; None: the next attention is an ordinary one."""
        mask, self._ahead = self._ahead, None
        return mask

    def reduce(self, x: Tensor, block: nn.Module, layer: int) -> Tensor:
        """One reduction step; x: (B, P + N, D) -> (B, P + M, D)."""
        seen, self._seen = self._seen, {}
        if images_in(x) == 0:  # no image, nothing to choose from
            return x
        with self._range():
            step, method = self._step(x, block, layer, seen), self.merging.method
            soft = block.training and method.softens(self.options)
            merged = (method.soft if soft else method.merge)(step)
            if soft:
                self.soft_steps[layer] = merged
                self.alive = getattr(merged, "mask", None)
            if self.bucket is not None and not method.is_static(self.options) and isinstance(merged, Grouping):
                width = self.bucket * math.ceil(merged.width / self.bucket)
                merged = merged.widened(min(width, step.x.shape[1]))
            self._follow(merged, layer)
            return torch.cat([x[:, : step.prefix], merged.merge(step.x)], dim=1)

    def _step(self, x: Tensor, block: nn.Module, layer: int, seen: Mapping[str, Tensor]) -> Step:
        sizes = None if self.reduction is None else self.reduction.sizes
        return Step(
            tokens=x,
            prefix=block.neighbors[0],
            grid=self.grid,
            made_for=self.merging.target.grid,
            sizes=sizes,
            padded=self._padding is not None,
            layer=layer,
            depth=self.merging.target.depth,
            batch=self.options["batch"] or ("uniform" if block.training else "ragged"),
            options=self.options,
            block=block,
            encoder=self.encoder,
            mask=self.alive,
            **seen,
        )

    def _follow(self, merged: Reduction, layer: int) -> None:
        """From now on the tokens are those of one more step."""
        self.step = merged
        self.reduction = merged if self.reduction is None else self.reduction.then(merged)
        self.steps[layer] = self.reduction
        self._padding = self.reduction.padding
        self.key_bias = attention_bias(self.reduction.sizes, self.options["attention"], self._padding)
        self._representatives = self._rotary = None

    def unmerge(self, x: Tensor, prefix: int = 0) -> Tensor:
        """Give every patch its token back: (B, P + M, C) -> (B, P + N, C), behind `prefix` tokens that stay."""
        if self.reduction is None or self.finished:
            return x
        with self._range():
            unmerged = self.reduction.unmerge(x[:, prefix:], scores=True)
            return torch.cat([x[:, :prefix], unmerged], dim=1) if prefix else unmerged

    def finish(self, x: Tensor, prefix: int) -> Tensor:
        """Behind the last block of the encoder, before its last norm: undo the merge here, if the method says so."""
        if self.merging.method.undo == "encoder" and not self.finished:
            x = self.unmerge(x, prefix)
            self.finished, self._padding, self.key_bias = True, None, None
        return x

    def pack(self, x: Tensor, before: int, after: int) -> Tensor:
        """Concatenate the tokens of all images, (B, before + M + after, D) -> (1, T, D), if they differ in number and
        no hook looks into a block."""
        differ = self._padding is not None and self.bucket is None and not self.merging.watched
        if self.packing is not None or not differ:
            return x
        bias = attention_bias(self.reduction.sizes, self.options["attention"])
        self.packing, self._rotary = Packing(self.reduction, before, after, bias), None
        return self.packing.pack(x)

    def unpack(self, x: Tensor) -> Tensor:
        """Undo `pack`, if it was done."""
        packing, self.packing = self.packing, None
        if packing is None:
            return x
        self._rotary = None
        return packing.unpack(x)

    def drop(self, drop_path: nn.Module, x: Tensor) -> Tensor:
        """Stochastic depth, which leaves out whole images; x: (B, L, D) or, packed, (1, T, D)."""
        return drop_path(x) if self.packing is None else self.packing.drop(drop_path, x)

    def mask(self, before: int, after: int, x: Tensor, fused: bool, training: bool) -> Tensor | None:
        """Mask of the next attention: an additive bias (B, 1, 1, before + M + after), the mask of packed tokens, that
        of a training step, or None.

        Args:
            before, after: tokens in front of and behind the patch tokens, which count as one patch each.
            x: the tokens that attend, (B, before + M + after, D).
            fused: whether attention hands it to `scaled_dot_product_attention`.
            training: whether the block is in training mode.

        Raises:
            ValueError: a training step with masks, where attention is not fused.
        """
        masks = self.merging.method.masks
        if masks is not None and training and self.merging.method.softens(self.options):
            if not fused:
                raise ValueError(f"{self.merging.method.name} trains with fused attention only: set fused_attn = True")
            alive = x.new_ones(x.shape[:2]) if self.alive is None else F.pad(self.alive, (before, after), value=1.0)
            bias = None if self.key_bias is None else F.pad(self.key_bias, (before, after))
            return Masked.of(mask=alive, bias=bias, masking=masks)
        if self.packing is not None:
            return self.packing.mask
        if self.key_bias is None:
            return None
        bias = F.pad(self.key_bias, (before, after))
        return bias.as_subclass(KeyBias) if fused and carries(x) else bias.to(x.dtype)

    def rotary(self, table: Tensor | None) -> Tensor | None:
        """Rotary embedding of the current tokens, each that of its representative.

        Args:
            table: (N, 2d) or (H, N, 2d), sine and cosine of every patch; None: the model has none.

        Returns:
            The table itself while nothing was merged; then (B, 1 or H, M, 2d), or packed (1, 1 or H, T - P, 2d).
        """
        if table is None or self.reduction is None:
            return table
        if self._rotary is None or self._rotary[0] is not table:
            per_head = table if table.ndim == 3 else table.unsqueeze(0)
            if self._representatives is None:
                self._representatives = representatives(self.reduction, self.grid)
            of_tokens = per_head[:, self._representatives].transpose(0, 1)
            self._rotary = table, of_tokens if self.packing is None else self._packed_rotary(of_tokens)
        return self._rotary[1]

    def _packed_rotary(self, of_tokens: Tensor) -> Tensor:
        """(B, H, M, 2d) -> (1, H, T - P, 2d). The prefix tokens of the first image are left to the model; those of
        the others get a rotation by nothing."""
        sine, cosine = of_tokens.chunk(2, dim=-1)
        front = 0, 0, self.merging.prefix, 0
        rows = torch.cat([F.pad(sine, front), F.pad(cosine, front, value=1.0)], dim=-1).transpose(1, 2)
        return self.packing.pack(rows).transpose(1, 2)[:, :, self.merging.prefix :]

    def _range(self) -> Any:
        name = self.merging.range_name
        return nullcontext() if name is None else record_function(name)


def representatives(reduction: Reduction, grid: tuple[int, int]) -> Tensor:
    """The patch that stands for every token where a position is asked for.

    That is the member nearest to the group's centroid on the grid, of equally near ones the first. Tokens that are no
    groups of patches are samples of the sequence, and stand where they were taken.

    Args:
        reduction: from the patches to the tokens.
        grid: (gh, gw).

    Returns:
        (B, M), int64, patches in row-major order; 0 for padding.
    """
    n_patches, device = grid[0] * grid[1], reduction.counts.device
    patch = torch.arange(n_patches, device=device)
    if not hasattr(reduction, "assignment"):
        n_images, width = reduction.sizes.shape
        samples = ((2 * torch.arange(width, device=device) + 1) * n_patches).div(2 * width, rounding_mode="floor")
        return samples.expand(n_images, -1)
    assignment = reduction.assignment
    zeros = assignment.new_zeros(reduction.sizes.shape)
    members = zeros.scatter_add(1, assignment, torch.ones_like(assignment))
    # In integers, multiplied by the number of members: nearness is exact, and so are ties.
    distance = torch.zeros_like(assignment)
    for place in (patch // grid[1], patch % grid[1]):
        place = place.expand_as(assignment)
        total = zeros.scatter_add(1, assignment, place)
        distance += (place * members.gather(1, assignment) - total.gather(1, assignment)).square()
    key = distance * n_patches + patch
    far = torch.full_like(zeros, torch.iinfo(torch.int64).max)
    return far.scatter_reduce(1, assignment, key, "amin").where(members > 0, zeros) % n_patches


class Watchers:
    """The hooks through which somebody may look into modules.

    Args:
        modules: where to count them; what is put in their place later is not looked at.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        self.hooks = [getattr(module, kind) for module in modules for kind in kinds]

    def present(self) -> bool:
        """Whether there is any."""
        return any(map(len, self.hooks))
