"""Options of methods, each stated once: its check, its flag and its key."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any


@dataclass(frozen=True)
class Number:
    """Type of an option: a number in a range, or one of some words.

    Attributes:
        low, high: the range, both ends included.
        integer: whether it counts something. None: an integer or a fraction, told apart by how it is written.
        words: what may be given instead.
        read: words that only a command line takes, which turns them into a number.
    """

    low: float = -math.inf
    high: float = math.inf
    integer: bool | None = False
    words: tuple[str, ...] = ()
    read: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Words that may be typed in place of a number."""
        return self.words + self.read

    @property
    def allowed(self) -> str:
        """The range and the words, for messages."""
        kind = "an integer" if self.integer else "a number"
        low = f" from {self.low:g}" if self.low > -math.inf else ""
        high = f" {'to' if low else 'up to'} {self.high:g}" if self.high < math.inf else ""
        return " or ".join((kind + low + high, *self.names))

    def check(self, value: Any) -> Any:
        """The value as it is kept; raises a ValueError that says what is allowed."""
        if isinstance(value, str) and value in self.words:
            return value
        is_number = isinstance(value, Integral if self.integer else Real) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high:
            raise ValueError(f"give {replace(self, read=()).allowed}")
        return int(value) if isinstance(value, Integral) else float(value)

    def parse(self, text: str) -> float | int | str:
        """The value that a text on the command line stands for; raises a ValueError that says what is allowed."""
        if text in self.names:
            return text
        is_whole = self.integer or (self.integer is None and text.lstrip("+-").isdigit())
        try:
            return self.check(int(text) if is_whole else float(text))
        except ValueError:
            raise ValueError(f"give {self.allowed}") from None


@dataclass(frozen=True)
class Choice:
    """Type of an option: one of some words, or true and false."""

    words: tuple[str | bool, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The words as they are typed."""
        return tuple(str(word).lower() if isinstance(word, bool) else word for word in self.words)

    @property
    def allowed(self) -> str:
        """The words, for messages."""
        return " or ".join(self.names)

    def check(self, value: Any) -> str | bool:
        """The value; raises a ValueError that says what is allowed."""
        if not any(type(value) is type(word) and value == word for word in self.words):  # 1 is not true
            raise ValueError(f"choose {self.allowed}")
        return value

    def parse(self, text: str) -> str | bool:
        """The value that a text on the command line stands for."""
        return self.check(dict(zip(self.names, self.words, strict=True)).get(text, text))


SIMPLE: dict[Any, Number | Choice] = {int: Number(integer=True), float: Number(), bool: Choice((True, False))}


@dataclass(frozen=True)
class Option:
    """One option of a method: keyword of `patch.apply`, flag of every command, key of `variant.yml`.

    Attributes:
        default: its value, or a function of the `ModelShape`.
        help: what it means, with its unit.
        type: int, float, `Number`, `Choice`; None: that of the default.
        many: how many values it takes: False: one; True: one, or several in a list; a number: exactly so many.
        flag: its flag; None: its name. Two flags: the first takes one value, the second several. A mapping: switches,
            and the value that each stands for.
        key: its key in `variant.yml`; None: its name. Two keys: the first for one value, the second for several.
        none: what stands for None in flags and keys, where None is a value of its own; elsewhere None means the
            default.
        default_text: meaning of a default that is None, in words.
    """

    default: Any
    help: str
    type: Any = None
    many: bool | int = False
    flag: str | tuple[str, str] | Mapping[str, Any] | None = None
    key: str | tuple[str, str] | None = None
    none: Any = None
    default_text: str = ""

    @property
    def kind(self) -> Number | Choice:
        """The type that checks one value."""
        given = self.type or type(self.default)
        if not isinstance(given, Number | Choice) and given not in SIMPLE:
            raise ValueError(f"an option of type {given!r}: give int, float, Number or Choice")
        return given if isinstance(given, Number | Choice) else SIMPLE[given]

    @property
    def meaning(self) -> tuple[Any, ...]:
        """All that methods which share an option agree on."""
        return self.kind, self.many, self.flag, self.key, self.none

    def means_none(self, value: Any) -> bool:
        """Return whether a value stands for None."""
        return self.none is not None and (tuple(value) if isinstance(value, list) else value) == self.none

    def check(self, name: str, value: Any) -> Any:
        """The value as it is kept: one value, or a tuple (for exactly so many) or list of them.

        Raises:
            ValueError: it is not allowed; names the option, the value and what is allowed.
        """
        try:
            return self._checked(value)
        except ValueError as error:
            raise ValueError(f"{name} {value!r}: {error}") from None

    def _checked(self, value: Any) -> Any:
        kind, several = self.kind, isinstance(value, Sequence) and not isinstance(value, str)
        if self.many is False or (self.many is True and not several):
            return kind.check(value)
        if not several or not value or (self.many is not True and len(value) != self.many):
            count = "one value or several" if self.many is True else f"{self.many} values"
            raise ValueError(f"give {count}, each {kind.allowed}")
        return (list if self.many is True else tuple)(kind.check(one) for one in value)
