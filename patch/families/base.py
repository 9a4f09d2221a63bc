"""What all families share: the class that is put in front of a module's own, and the flow through a block."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from patch.attention import Seen, can_pack, sees_keys
from patch.state import Merging, Pass


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


class Family(ABC):
    """One kind of ViT and how it is taken apart.

    Attributes:
        name: for messages.
        block_front: `PatchedBlock` of this kind.
        encoder_front: `Patched` of the model itself: begins and ends a pass.
    """

    name: str
    block_front: type["PatchedBlock"]
    encoder_front: type[Patched]

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
    """

    ATTRIBUTES = ("merging", "neighbors", "places", "last")

    merging: Merging
    neighbors: tuple[int, int]
    places: dict[str, int]
    last: bool

    def attend(self, x: Tensor, here: Pass, rope: Tensor | None = None) -> Tensor:
        """The half before the merge, by way of `attention`; x: (B, L, D)."""
        raise NotImplementedError

    def feed(self, x: Tensor, here: Pass) -> Tensor:
        """The half after the merge; x: (B, L, D)."""
        raise NotImplementedError

    def keys(self, normed: Tensor) -> Tensor:
        """Keys that the attention forms of its input, before any rotation: (B, L, D) -> (B, H, L, d)."""
        raise NotImplementedError

    def flow(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """x: (B, L, D) -> (B, L', D), with L' ≤ L where tokens merge. Between the blocks of a stack, the tokens of all
        images may be concatenated, (1, T, D)."""
        here = self.merging.current
        x = self._merge("before", x, here)
        x = self.attend(self._arrange(x, here), here, rope)
        if "attention" in self.places:
            x = self._arrange(self._merge("attention", x, here), here)
        x = self._merge("block", self.feed(x, here), here)
        return here.unpack(x) if self.last else x

    def attention(self, normed: Tensor, here: Pass, **arguments: Any) -> Tensor:
        """This block's own attention under the mask of the pass; normed: its input, (B, L, D)."""
        needs = self.merging.method.needs if self.places else ()
        mask = here.mask(*self.neighbors, normed, fused=self.attn.fused_attn)
        if "keys" in needs and "rope" not in arguments and sees_keys(self.attn) and not self.merging.watched:
            mask = Seen.of(mask=mask)
        out = self.attn(normed, attn_mask=mask, **arguments)
        keys = mask.keys if isinstance(mask, Seen) else None
        if "keys" in needs and keys is None:
            with torch.no_grad():
                keys = self.keys(normed)
        if needs:
            here.see(normed if "normed" in needs else None, keys)
        return out

    def _merge(self, place: str, x: Tensor, here: Pass) -> Tensor:
        """One reduction step, if the method has one at this place."""
        return here.reduce(here.unpack(x), self, self.places[place]) if place in self.places else x

    def _arrange(self, x: Tensor, here: Pass) -> Tensor:
        """Tokens packed where this block can work on them so, else padded."""
        dropout = self.attn.attn_drop.p if self.training else 0
        if self.attn.fused_attn and can_pack(x, dropout):
            return here.pack(x, *self.neighbors)
        return here.unpack(x)


def check_plain(attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raise a ValueError for a mask of the caller's: its rows are patches, and merged tokens are not."""
    if attn_mask is not None or is_causal:
        raise ValueError(
            "a patched model takes no attn_mask and no is_causal: a mask of patches does not fit merged tokens; "
            "call patch.remove first"
        )
