"""Hooks that read modules."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# transformers leaves its hooks in place once hidden states were asked for; they sleep until the next time.
CAPTURING = "transformers.utils.output_capturing"


def are_watched(modules: Iterable[nn.Module]) -> bool:
    """Return whether a hook looks into any of some modules, or into all modules of the process."""
    everywhere: Any = sys.modules["torch.nn.modules.module"]
    if any(getattr(everywhere, f"_global{kind}", None) for kind in KINDS):
        return True
    return any(is_watched(part) for module in modules for part in module.modules())


def is_watched(module: nn.Module) -> bool:
    """Return whether a hook looks at a module itself."""
    return any(_is_awake(hook) for kind in KINDS for hook in getattr(module, kind).values())


def exposes_output(module: nn.Module) -> bool:
    """Return whether a hook looks at the output of a module."""
    return any(map(_is_awake, module._forward_hooks.values())) or bool(module._backward_hooks)


def _is_awake(hook: Any) -> bool:
    """Return whether a hook looks at what passes by."""
    if getattr(hook, "__module__", None) != CAPTURING:
        return True
    return bool(sys.modules[CAPTURING]._active_collector.get())  # what is asked for in this call
