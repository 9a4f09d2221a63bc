"""The common part of all families: the class that is mixed into a module's own, and the way through a block."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from patch.attention import AttentionMask, QKRecorder
from patch.hooks import exposes_input, exposes_output
from patch.layout import Around, Rows
from patch.look import Look
from patch.track import Merging, Track

INSTEAD = "give the model to torch.export or torch.compile, or call patch.remove first"
RECORD = "_patch"  # the one attribute that a patch gives a module
COMPILATION = "_compilation"  # and `patch.compile`
# Methods of which a patch takes the place, in one module or another.
REPLACED = "forward", "forward_features", "forward_intermediates", "network", "to_grid"


@dataclass(eq=False)
class Record:
    """The record of a patch in one module.

    Attributes:
        merging: what the patch put into the model.
        index: of a block, counted from 0, first those of the encoder, then those of a decoder; -1 for other modules.
        n_around: number of tokens before and after the patch tokens: in a block, of a ViT behind its last block.
        merges_at: place of a merge in a block -> the layer that the method calls it.
        leaves_rows: whether every image has its row after a block: where queries join.
        more: what its family adds.
    """

    merging: Merging
    index: int = -1
    n_around: Around = (0, 0)
    merges_at: dict[str, int] = field(default_factory=dict)
    leaves_rows: bool = False
    more: Any = None


class Patched(nn.Module):
    """Base of the classes that a patch mixes into a module's own. Such modules copy and pickle."""

    _patch: Record

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, _classes(type(self)), self.__dict__

    def __prepare_scriptable__(self) -> Any:
        """Called by `torch.jit.script`."""
        raise ValueError(f"torch.jit.script has no words for merges: {INSTEAD}")


@cache
def _mixed(mixin: Any, own: Any) -> type:
    """A class of the same name: libraries look classes up by it."""
    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "_mixin": mixin}
    return type(own.__name__, (mixin, own), names)


def _is_mixed(cls: type) -> bool:
    return "_mixin" in vars(cls)


def _classes(cls: type) -> tuple[type, ...]:
    """The mixins of a class, outermost first, then the class that they were mixed into."""
    mixins = []
    while _is_mixed(cls):
        mixin, cls = cls.__bases__
        mixins.append(mixin)
    return *mixins, cls


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before anything was mixed into it."""
    return _without_mixins(type(module))


def _blank(*classes: type) -> nn.Module:
    """A module without attributes, of `_classes`."""
    *mixins, cls = classes
    for mixin in reversed(mixins):
        cls = _mixed(mixin, cls)
    return nn.Module.__new__(cls)


def mix_in(module: Any, mixin: Any, **attributes: Any) -> None:
    """Give a module another class, `mixin` before its own; its parameters stay the objects they are."""
    module.__dict__.update(attributes)
    own: Any = type(module)
    module.__class__ = _mixed(mixin, own)


def mix_out(module: nn.Module) -> None:
    """Undo every `mix_in`, also below classes that others put on top since (FSDP2, parametrizations)."""
    module.__class__ = _without_mixins(type(module))
    for name in (RECORD, COMPILATION):
        module.__dict__.pop(name, None)


def _without_mixins(cls: type) -> type:
    if _is_mixed(cls):
        return _without_mixins(cls.__bases__[1])
    if not issubclass(cls, Patched):
        return cls
    bases = tuple(map(_without_mixins, cls.__bases__))  # of a class that a wrapper made of a mixed one
    siblings: list[type] = bases[-1].__subclasses__()
    for known in siblings:  # as it would have made of the class itself
        if known.__bases__ == bases and known.__qualname__ == cls.__qualname__:
            return known
    # Not a forward that transformers wrapped around the patched one when the class was made.
    left_out = {name for name, value in vars(cls).items() if hasattr(value, "__wrapped__")} | {
        "__dict__",
        "__weakref__",
    }
    content = {name: value for name, value in vars(cls).items() if name not in left_out}
    return type.__call__(type(cls), cls.__name__, bases, content)


class PatchedModel(Patched):
    """A model, or the encoder in it, that starts passes."""

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """While open, this thread may trace or export the model, whose shapes depend on the image."""
        with self._patch.merging.tracing():
            yield


class Family(ABC):
    """One kind of ViT and how it is taken apart.

    Attributes:
        name: for messages.
        learns: whether the learned parts of methods can be built into it.
        shows_all: whether its last block always gives all patches back.
        block_mixin: `PatchedBlock` of this kind.
        model_mixin: `Patched` of the ViT itself: starts and ends a pass.
    """

    name: str
    learns = True
    shows_all = False
    block_mixin: type["PatchedBlock"]
    model_mixin: type[Patched]

    def attach(self, model: Any, merging: Merging) -> None:
        """Let a ViT start and end passes; `mix_out` undoes it."""
        n_around = self.tokens_before(model, len(self.blocks(model)) - 1), 0
        mix_in(model, self.model_mixin, _patch=Record(merging, n_around=n_around))

    @abstractmethod
    def knows(self, model: nn.Module) -> bool:
        """Return whether a model is of this kind, a subclass included."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raise a ValueError if this one cannot be patched, with the reason."""

    @abstractmethod
    def blocks(self, model: Any) -> Sequence[Any]:
        """Its blocks."""

    @abstractmethod
    def n_prefix(self, model: Any) -> int:
        """Number of prefix tokens: CLS, distillation and register tokens."""

    def n_queries(self, model: Any) -> tuple[int, int]:
        """Number of learned queries that join the tokens, and the number of blocks before they do; (0, 0): none do."""
        return 0, 0

    def tokens_before(self, model: Any, index: int) -> int:
        """Number of tokens before the patches in a block; index: of the block, counted from 0."""
        n_queries, first = self.n_queries(model)
        return self.n_prefix(model) + (n_queries if index >= first else 0)

    @abstractmethod
    def has_cls(self, model: Any) -> bool:
        """Return whether the first token of the sequence is a CLS token."""

    @abstractmethod
    def grid(self, model: Any, size: Sequence[int] | None = None) -> tuple[int, int]:
        """(gh, gw), patches of images of (height, width) pixels; None: of those that it was made for."""

    def rotary_table(self, model: Any, grid: tuple[int, int]) -> Tensor:
        """Sine and cosine of every patch of an image of (gh, gw) patches, as its blocks get them: (N, 2d), or
        (H, N, 2d) for every block."""
        raise NotImplementedError(f"{self.name} has no rotary embedding")


class PatchedBlock(Patched):
    """A block after a patch: the bias of merged tokens goes into its attention, and tokens merge where the method
    says. A family says what its halves are."""

    attn: Any
    norm1: Any

    def run(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """The way through a block.

        Args:
            x: (B, L, D), or the tokens of all images concatenated, (1, T, D), as the block before left them.
            rope: rotary table of the patches; None: the model has none.

        Returns:
            (B, L', D) or (1, T', D), with L' ≤ L where tokens merge.
        """
        track = self._patch.merging.current
        assert track is not None
        if track.breaks_graph:
            from patch.families.parts import run_in_parts  # here, for it imports Dynamo

            return run_in_parts(self, track, x, rope)
        x = track.merge_at("before", track.resume(x, self), self)
        x, layout = track.arrange(x, self)
        x, look = self.attend(x, layout, track.rotary_table(rope, self._patch.index))
        x, layout = track.arrange(track.merge_at("attention", x, self, look), self)
        x = self.feed(x, layout)
        return track.leave(track.merge_at("block", x, self, look), self)

    def attend(self, x: Tensor, layout: Rows, rope: Tensor | None) -> tuple[Tensor, Look | None]:
        """The half before the merge; x: as it lies. Gives a look at its attention, where tokens merge by it."""
        normed, rotary = self.normalized(x), layout.rotary(rope)
        mask = layout.mask(normed, self.attention_is_fused)
        looks = self._patch.merges_at.keys() - {"before"}
        if looks and self.attention_is_fused and layout.tokens.soft_masking is None:
            mask = QKRecorder(mask)
        out = self.run_attention(normed, mask, rotary)
        if isinstance(mask, AttentionMask) and not mask.was_taken:
            raise ValueError(
                f"the attention of a {own_class(self).__name__} ran without the mask of merged tokens, by a forward or "
                "a function that was exchanged: call patch.remove, take it away, then patch.apply"
            )
        soft = self.training and self._patch.merging.method.training_form is not None
        look = Look(self, layout, x, normed, rotary, mask, soft) if looks else None
        return self.add_attention(x, out, layout), look

    def normalized(self, x: Tensor) -> Tensor:
        """The input of the block's attention; x: (B, L, D)."""
        return self.norm1(x)

    def run_attention(self, normed: Tensor, mask: AttentionMask | Tensor | None, rotary: Tensor | None) -> Tensor:
        """The block's own attention module: (B, L, D) -> (B, L, D)."""
        return self.attn(normed, attn_mask=mask, **({} if rotary is None else {"rope": rotary}))

    def add_attention(self, x: Tensor, out: Tensor, layout: Rows) -> Tensor:
        """The residual stream after attention; x, out: (B, L, D)."""
        raise NotImplementedError

    def feed(self, x: Tensor, layout: Rows) -> Tensor:
        """The half after the merge; x: (B, L, D)."""
        raise NotImplementedError

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values that the attention forms of its input: (B, L, D) -> (B, H, L, d) each, before
        rotation."""
        raise NotImplementedError

    def rotate(self, x: Tensor, rotary: Tensor) -> Tensor:
        """Queries or keys, (B, H, L, d), rotated as the attention does."""
        raise NotImplementedError

    def is_read(self, track: Track, is_last: bool) -> bool:
        """Return whether the output of this block is looked at, so that it has to have all patches."""
        return self._patch.index in track.outputs_read

    @property
    def attention_is_fused(self) -> bool:
        """True where its attention hands masks to `scaled_dot_product_attention`."""
        return self.attn.fused_attn

    @property
    def attention_scale(self) -> float:
        """Factor of the products of queries and keys."""
        return self.attn.scale

    @property
    def attention_dropout(self) -> float:
        """Probability with which attention weights are dropped in training."""
        return self.attn.attn_drop.p


def vary(x: Tensor | None, axis: int) -> None:
    """Tell the compiler that a size changes from pass to pass, so that it does not begin with one for this alone."""
    if x is not None and x.shape[axis] > 1:
        torch._dynamo.maybe_mark_dynamic(x, axis)


class OpenBlock(PatchedBlock):
    """A block whose last one gives every patch its token back, so that what follows sees all of them; so does one
    whose output a hook looks at, be it as the input of the next."""

    def is_read(self, track: Track, is_last: bool) -> bool:
        if is_last or super().is_read(track, is_last):
            return True
        index = self._patch.index
        return exposes_output(self, index) or exposes_input(track.blocks[index + 1])


class OpenFamily(Family):
    """A kind of ViT that is patched by its call: its embedding tells the grid, its last block gives all patches
    back."""

    learns = False  # learned parts are named after timm's modules
    shows_all = True

    @abstractmethod
    def embedding(self, model: Any) -> tuple[nn.Module, type["PatchedEmbedding"], Any]:
        """The module before the blocks, what is mixed into it, and what that has to know."""

    def attach(self, model: Any, merging: Merging) -> None:
        super().attach(model, merging)
        module, mixin, more = self.embedding(model)
        mix_in(module, mixin, _patch=Record(merging, more=more))


class PatchedEmbedding(Patched):
    """The module before the blocks, which tells a pass the grid."""

    def tell_grid(self, grid: Sequence[int]) -> None:
        """grid: (gh, gw), patches of the images. Outside of a pass nobody needs to know."""
        track = self._patch.merging.current
        if track is not None and track.grid is None:
            track.start_encoder((int(grid[0]), int(grid[1])))


def check_traced(x: Any) -> None:
    """Raise a ValueError for the input of a trace by `torch.fx`, which knows no shapes."""
    if isinstance(x, torch.fx.Proxy):
        raise ValueError(
            f"torch.fx cannot trace a patched model: {INSTEAD}; to read features, use hooks or forward_intermediates"
        )


def check_plain(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise a ValueError for a mask of the caller's: its rows are patches, and merged tokens are not."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "a patched model takes no attn_mask and no is_causal: a mask of patches does not fit merged tokens; "
            "call patch.remove first"
        )


def modules_of(blocks: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """All modules in some blocks, the blocks first."""
    for block in blocks:
        yield from block.modules()


def check_forward(modules: Iterable[nn.Module]) -> None:
    """Raise a ValueError for a module with a `forward` of its instance, or another of `REPLACED`, which may pass a
    patch by."""
    for module in modules:
        name = next((name for name in REPLACED if name in vars(module)), None)
        if name is not None:
            raise ValueError(
                f"a {own_class(module).__name__} has a {name} of its own instance (as accelerate's hooks set it), "
                "which a patch does not see: call patch.apply before it is set, or patch.remove after it is taken away"
            )


def note_outside(block: PatchedBlock) -> None:
    """Warn that a block runs without a pass around it.

    Raises:
        ValueError: it runs in a backward pass: a checkpoint repeats it, and what was merged is no longer known.
    """
    if not torch.compiler.is_compiling():
        if torch._C._current_graph_task_id() != -1:
            raise ValueError(
                f"a patched {own_class(block).__name__} ran again in a backward pass, where its merges are no longer "
                "known: put no checkpoint around blocks, but around the whole model or around parts of a block"
            )
        warnings.warn(
            f"a patched {own_class(block).__name__} ran by itself, nothing merges: call the model, which starts a pass",
            stacklevel=3,
        )
