"""Keeps a journal of every change made to a model, and plays it backwards to restore the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_ABSENT: Any = object()


class Undo:
    """Restores a rewritten model exactly. Holds the original parameters until it is released or dropped."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []
        self._last: list[Callable[[], None]] = []

    def __len__(self) -> int:
        return len(self._steps)

    def push(self, step: Callable[[], None]) -> None:
        """Add one step that reverses a change just made."""
        self._steps.append(step)

    def set_attribute(self, module: nn.Module, name: str, value: Any) -> None:
        """Set a plain instance attribute, journalled."""
        self.set_item(module.__dict__, name, value)

    def set_item(self, mapping: dict[str, Any], key: str, value: Any) -> None:
        """Set `mapping[key]`, journalled."""
        old = mapping.get(key, _ABSENT)

        def step() -> None:
            if old is _ABSENT:
                mapping.pop(key, None)
            else:
                mapping[key] = old

        mapping[key] = value
        self.push(step)

    def set_class(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Swap the class of `module`, journalled."""
        old = type(module)
        module.__class__ = cls
        self.push(lambda: setattr(module, "__class__", old))

    def undo(self) -> None:
        """Play the journal backwards; a second call does nothing."""
        while self._steps:
            self._steps.pop()()

    def at_release(self, step: Callable[[], None]) -> None:
        """Add a step to run when the rewrite is final."""
        self._last.append(step)

    def release(self) -> None:
        """Forget the originals (and free the full parameters): the rewrite is final."""
        self._steps.clear()
        self.settle()

    def settle(self) -> None:
        """Run the steps of `at_release`, and keep the journal: what they free, it can no longer restore."""
        while self._last:
            self._last.pop(0)()
