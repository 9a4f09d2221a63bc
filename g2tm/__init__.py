"""Merging methods: pure functions from tokens to a `Reduction`. Knows no model, no file, no command line.

These arguments mean the same in all of them; a value that is not allowed raises a ValueError that says what is:

- `x`: (B, N, D), the patch tokens of B images. `metric` or `keys`: the tokens' vectors that are compared by cosine.
- `grid`: (gh, gw) with gh·gw = N; the tokens are then in row-major order.
- `r`: number of tokens to remove, at most half of an image's.
- `tokens`: exact number of tokens that every image keeps; shapes are then known without waiting for the device.
- `threshold`: from -1 to 1 where it is a cosine similarity.
- `sizes`: (B, N), patches that each token carries already; None: one each.
- `padding`: (B, N), bool, True for slots without a token, the last ones of their image; None: there are none.
- `odd_first`: True if the first token is at an odd position of the whole sequence: behind an odd number of prefix
  tokens.
- `batch`: "ragged": every image keeps its own number of tokens. "uniform": every image merges as much as the one that
  merges least, its most similar tokens.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from g2tm.api import *  # noqa: F403


class _Package(ModuleType):
    """Imports the methods, and torch with them, when one is first asked for: the command `g2tm` starts without."""

    def __getattr__(self, name: str) -> Any:
        if name == "__all__" or not name.startswith("__"):
            api = import_module("g2tm.api")
            vars(self).update({one: getattr(api, one) for one in ("__all__", *api.__all__)})
            found = vars(self).get(name) or sys.modules.get(f"g2tm.{name}")
            if found is not None:
                return found
        raise AttributeError(f"module 'g2tm' has no attribute {name!r}", name=name, obj=self)

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system would put the module `g2tm.clap` where the method of this name is looked for. Packages,
        # which are here in a wheel, have no such names.
        if not isinstance(value, ModuleType) or hasattr(value, "__path__"):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *self.__all__})


sys.modules[__name__].__class__ = _Package
