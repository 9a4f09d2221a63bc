"""What all families share: the class that is put in front of a module's own, and the flow through a block."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from patch.attention import Ahead, Masked, Seen, can_look, can_pack
from patch.state import Merging, Pass

FROM_ATTENTION = frozenset({"keys", "row", "means"})  # needs that are made of queries and keys


class Patched(nn.Module):
    """Base of the classes that a patch puts in front of a module's own. Such modules copy and pickle.

    Attributes:
        ATTRIBUTES: names of what the patch gives such a module.
    """

    ATTRIBUTES: tuple[str, ...]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, _classes(self), self.__dict__


@cache
def _in_front(front: type[Patched], own: type[nn.Module]) -> type:
    return type(f"Patched{own.__name__}", (front, own), {})


def _classes(module: nn.Module) -> tuple[type, ...]:
    """What was put in front of a module, outermost first, then its own class."""
    fronts, own = [], type(module)
    while issubclass(own, Patched):
        front, own = own.__bases__
        fronts.append(front)
    return *fronts, own


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before anything was put in front."""
    return _classes(module)[-1]


def _blank(*classes: type) -> nn.Module:
    """A module without attributes, of `_classes`."""
    *fronts, new = classes
    for front in reversed(fronts):
        new = _in_front(front, new)
    return nn.Module.__new__(new)


def put_in_front(module: nn.Module, front: type[Patched], **attributes: Any) -> None:
    """Give a module another class, `front` before its own; its parameters stay the objects they are."""
    module.__dict__.update(attributes)
    module.__class__ = _in_front(front, type(module))


def take_away(module: nn.Module) -> None:
    """Undo `put_in_front`."""
    bases: Any = type(module).__bases__
    front, module.__class__ = bases
    for name in front.ATTRIBUTES:
        module.__dict__.pop(name, None)


class PatchedModel(Patched):
    """A model, or the encoder in it, that begins and ends passes."""

    ATTRIBUTES = ("merging",)

    merging: Merging

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """While open, this thread may trace or export the model, whose shapes depend on the image."""
        with self.merging.tracing():
            yield


class Family(ABC):
    """One kind of ViT and how it is taken apart.

    Attributes:
        name: for messages.
        learns: whether the learned parts of methods can be built into it.
        block_front: `PatchedBlock` of this kind.
        encoder_front: `Patched` of the model itself: begins and ends a pass.
    """

    name: str
    learns = True
    block_front: type["PatchedBlock"]
    encoder_front: type[Patched]

    def attach(self, model: nn.Module, merging: Merging) -> None:
        """Let a model begin and end passes; `take_away` undoes it."""
        put_in_front(model, self.encoder_front, merging=merging)

    @abstractmethod
    def knows(self, model: nn.Module) -> bool:
        """Whether a model is of this kind, a subclass included."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise a ValueError if this one cannot be patched, with the reason."""

    @abstractmethod
    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        """Its blocks."""

    @abstractmethod
    def prefix(self, model: nn.Module) -> int:
        """Number of prefix tokens: CLS, distillation and register tokens."""

    def in_front(self, model: nn.Module, index: int) -> tuple[int, bool]:
        """How many tokens are in front of the patches in a block, and whether every image has its row again after it:
        at the end, and where tokens join.

        Args:
            index: of the block, counted from 1.
        """
        return self.prefix(model), index == len(self.blocks(model))

    @abstractmethod
    def has_cls(self, model: nn.Module) -> bool:
        """Whether the first prefix token is a CLS token."""

    @abstractmethod
    def embed(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        """What comes before the blocks: images (B, 3, H, W) -> tokens (B, P + N, D), and the rotary table that each
        block gets, None for a family without."""

    @abstractmethod
    def grid(self, model: nn.Module, size: Sequence[int] | None = None) -> tuple[int, int]:
        """(gh, gw), patches of images of (height, width) pixels; None: of those that it was made for."""


class PatchedBlock(Patched):
    """A block after a patch: the bias of merged tokens goes into its attention, and tokens merge where the method
    says. A family says what its halves are.

    Attributes:
        merging: what the patch put into the model.
        neighbors: number of tokens in front of and behind the patch tokens.
        places: place of a merge in this block -> the layer that the method calls it.
        last: whether it is the last of its stack, behind which every image has its row again.
        index: counted from 0; -1 behind the encoder.
    """

    ATTRIBUTES = ("merging", "neighbors", "places", "last", "index")

    merging: Merging
    neighbors: tuple[int, int]
    places: dict[str, int]
    last: bool
    index: int

    def go(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """`flow`, and all patches where the output of this block is read."""
        here = self.merging.current
        x = self.flow(here.hidden(x), rope)
        return here.show(x, self.neighbors[0]) if self.index in here.reads else x

    def normalized(self, x: Tensor) -> Tensor:
        """What the attention of this block works with; x: (B, L, D)."""
        return self.norm1(x)

    def attend(self, x: Tensor, here: Pass, rope: Tensor | None = None) -> Tensor:
        """The half before the merge, by way of `attention_of`; x: (B, L, D)."""
        raise NotImplementedError

    def feed(self, x: Tensor, here: Pass) -> Tensor:
        """The half after the merge; x: (B, L, D)."""
        raise NotImplementedError

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys that the attention forms of its input: (B, L, D) -> (B, H, L, d) each, before rotation."""
        raise NotImplementedError

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Queries or keys, (B, H, L, d), rotated as the attention does."""
        raise NotImplementedError

    def flow(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """x: (B, L, D) -> (B, L', D), with L' ≤ L where tokens merge. Between the blocks of a stack, the tokens of all
        images may be concatenated, (1, T, D)."""
        here = self.merging.current
        x = self._merge("before", x, here)
        x = self._merge_ahead(here.unpack(x), here, rope) if "ahead" in self.places else self._arrange(x, here)
        x = self.begin(x, here, rope)
        if "attention" in self.places:
            x = self._arrange(self._merge("attention", x, here), here)
        x = self._merge("block", self.feed(x, here), here)
        x = here.unpack(x) if self.last else x
        return here.finish(x, self.neighbors[0]) if self.index == self.merging.target.depth - 1 else x

    def begin(self, x: Tensor, here: Pass, rope: Tensor | None = None) -> Tensor:
        """`attend`, after a look at the input of the block."""
        if "input" in self.needs:
            here.see(input=x)
        return self.attend(x, here, rope)

    @property
    def attention_is_fused(self) -> bool:
        """Whether its attention hands masks to `scaled_dot_product_attention`."""
        return self.attn.fused_attn

    @property
    def attention_scale(self) -> float:
        """Of the products of queries and keys."""
        return self.attn.scale

    @property
    def attention_dropout(self) -> float:
        """Probability with which attention weights are dropped in training."""
        return self.attn.attn_drop.p

    def run_attention(self, normed: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        """The block's own attention module: (B, L, D) -> (B, L, D)."""
        return self.attn(normed, attn_mask=mask, **({} if rope is None else {"rope": rope}))

    @property
    def needs(self) -> frozenset[str]:
        """What the method has to see while this block runs."""
        return self.merging.method.needs if self.places.keys() - {"ahead"} else frozenset()

    def attention_of(self, normed: Tensor, here: Pass, rope: Tensor | None = None) -> Tensor:
        """This block's own attention under the mask of the pass; normed: its input, (B, L, D)."""
        needs = self.needs
        mask = here.take_ahead()
        if mask is None:
            mask = here.mask(*self.neighbors, normed, self.attention_is_fused, self.training)
        looks = needs & FROM_ATTENTION and self.attention_is_fused and can_look(self.attn) and not self.merging.watched
        if looks and not isinstance(mask, Masked):
            mask = Seen.of(mask=mask)
        out = self.run_attention(normed, mask, rope)
        if "normed" in needs:
            here.see(normed=normed)
        if needs & FROM_ATTENTION:
            soft = self.training and self.merging.method.softens(here.options)
            with torch.set_grad_enabled(torch.is_grad_enabled() and soft):
                self._look(normed, here, rope, needs, mask)
        return out

    def _look(
        self, normed: Tensor, here: Pass, rope: Tensor | None, needs: Collection[str], mask: Tensor | None
    ) -> None:
        """Keep what the method needs of the attention that has run under a mask."""
        pair = mask.pair if isinstance(mask, Seen | Masked) else None
        plain = pair if rope is None else None  # rotated keys tell where a token stands, not what it shows
        if plain is None and ("keys" in needs or pair is None):
            plain = self.project(normed)
        if "keys" in needs:
            here.see(keys=plain[1].float().mean(1))
        if isinstance(mask, Masked):
            summaries = {"row": mask.map[:, :, 0].mean(1), "means": mask.map.mean((1, 2))}
            here.see(**{name: value for name, value in summaries.items() if name in needs})
            return
        query, key = pair or plain
        if pair is None and rope is not None:
            query, key = self.rotate(query, rope), self.rotate(key, rope)
        here.see_map(query, key, self.attention_scale, needs, self.neighbors)

    def _merge_ahead(self, x: Tensor, here: Pass, rope: Tensor | None) -> Tensor:
        """Merge by the attention that all tokens would have in this block, which then goes on with that."""
        if not self.attention_is_fused:
            name = self.merging.method.name
            raise ValueError(
                f"{name} reuses attention in this form, which takes fused attention: set fused_attn = True"
            )
        table, normed, needs = here.rotary(rope), self.normalized(x), self.merging.method.needs
        mask = here.mask(*self.neighbors, normed, True, self.training)
        query, key = self.project(normed)
        here.see(input=x, normed=normed, keys=key.float().mean(1))
        if table is not None:
            query, key = self.rotate(query, table), self.rotate(key, table)
        with torch.no_grad():
            here.see_map(query, key, self.attention_scale, needs, self.neighbors)
        merged = self._merge("ahead", x, here)
        if here.step is not None:  # it is where there is no image
            here.keep_ahead(Ahead.of(pair=(query, key), mask=mask, step=here.step, prefix=self.neighbors[0]))
        return merged

    def _merge(self, place: str, x: Tensor, here: Pass) -> Tensor:
        """One reduction step, if the method has one at this place."""
        return here.reduce(here.unpack(x), self, self.places[place]) if place in self.places else x

    def _arrange(self, x: Tensor, here: Pass) -> Tensor:
        """Tokens packed where this block can work on them so, else padded."""
        if self.attention_is_fused and can_pack(x, self.attention_dropout if self.training else 0):
            return here.pack(x, *self.neighbors)
        return here.unpack(x)


class OpenBlock(PatchedBlock):
    """A block of a model whose own class has to stay: a pass begins before the first block, see `OpenFamily`. The last
    one gives every patch its token back, so that what follows sees all of them; so does one whose output is looked at.

    Attributes:
        ends: whether it is the last one.
        shown: whether the model itself looks at its output.
    """

    ATTRIBUTES = (*PatchedBlock.ATTRIBUTES, "ends", "shown")

    ends: bool
    shown: bool

    def go(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """(B, P + N, D), or tokens that are merged already, to the same."""
        here = self.merging.current
        x = self.flow(here.hidden(x), rope)
        if self.ends:
            self.merging.end()
            return here.unmerge(x, self.neighbors[0])
        return here.show(x, self.neighbors[0]) if self.shown or self._forward_hooks else x


class OpenFamily(Family):
    """A kind of ViT whose own class has to stay: a module in front of its blocks begins a pass, the last block ends
    it."""

    learns = False  # learned parts are named after timm's modules

    @abstractmethod
    def begin(self, model: nn.Module, merging: Merging) -> None:
        """Put a class that begins passes in front of the module that comes before the blocks."""

    def shown(self, model: nn.Module, index: int) -> bool:
        """Whether the model looks at the output of a block, counted from 1."""
        return False

    def attach(self, model: nn.Module, merging: Merging) -> None:
        model.__dict__["merging"] = merging
        blocks = self.blocks(model)
        for index, block in enumerate(blocks, start=1):
            block.__dict__.update(ends=index == len(blocks), shown=self.shown(model, index))
        self.begin(model, merging)

    def embed(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Sequence[Tensor | None]]:
        raise ValueError(f"patch.compile knows Segmenters alone, not {self.name}: use torch.compile")


def check_plain(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise a ValueError for a mask of the caller's: its rows are patches, and merged tokens are not."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "a patched model takes no attn_mask and no is_causal: a mask of patches does not fit merged tokens; "
            "call patch.remove first"
        )
