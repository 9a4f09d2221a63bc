"""Hooks that read modules."""

import sys
from collections.abc import Iterable
from typing import Any

from torch import nn

KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# transformers leaves its hooks in place once an output was asked for; they sleep until the next time.
CAPTURING = "transformers.utils.output_capturing"
STATES, CHOSEN = "hidden_states", "_hidden_states_layers"  # what they collect of blocks, and of which ones


def are_watched(modules: Iterable[nn.Module]) -> bool:
    """Return whether a hook looks into any of some modules, or into all modules of the process."""
    everywhere: Any = sys.modules["torch.nn.modules.module"]
    if any(getattr(everywhere, f"_global{kind}", None) for kind in KINDS):
        return True
    inside = _captured().keys() - {STATES, CHOSEN}  # outputs of blocks show nothing of their inside
    return any(_is_watched(part, bool(inside)) for module in modules for part in module.modules())


def _is_watched(module: nn.Module, captures: bool) -> bool:
    return any(captures or not _is_capturing(hook) for kind in KINDS for hook in getattr(module, kind).values())


def exposes_input(module: nn.Module) -> bool:
    """Return whether a hook looks at the input of a module: all do but transformers' own and those of gradients."""
    hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
    return not all(map(_is_capturing, hooks)) or bool(module._backward_pre_hooks or module._backward_hooks)


def exposes_output(module: nn.Module, index: int) -> bool:
    """Return whether a hook looks at the output of a block; index: of the block, counted from 0."""
    hooks = [*module._forward_hooks.values()]
    if not all(map(_is_capturing, hooks)) or module._backward_hooks:
        return True
    captured = _captured() if hooks else {}
    chosen = captured.get(CHOSEN)
    return STATES in captured and (chosen is None or index + 1 in chosen)  # state 0 is the input of the first block


def _is_capturing(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == CAPTURING


def _captured() -> dict[str, Any]:
    """Outputs that the running model of transformers is asked for."""
    return sys.modules[CAPTURING]._active_collector.get() or {} if CAPTURING in sys.modules else {}
