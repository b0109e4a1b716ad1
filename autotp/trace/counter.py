"""Counts blocks: a tagged int whose value no code looks into, as long as one block runs for all that are alike."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import nn

from autotp.trace.ints import IntExpr, Life, TaggedInt


class Counter(TaggedInt):
    """The number of a block among blocks alike to it, of which one runs for all.

    Every block does the same with it where code passes it on, or indexes something with it that is not the module's own (a cache).
    Module code that compares it or computes with it may do another thing in another block: it then calls `used`.
    """

    used: Callable[[], None]

    @classmethod
    def of(cls, value: int, expr: IntExpr, life: Life, used: Callable[[], None]) -> Counter:
        """Makes a counter that calls `used`."""
        self: Counter = cls(value, expr, life)
        self.used = used
        return self


def _in_module(depth: int) -> bool:
    """True where the code that runs `depth` frames above the caller has a module for its first argument, or closes over one."""
    frame = sys._getframe(depth + 1)
    while frame.f_code.co_name in ("<listcomp>", "<genexpr>", "<setcomp>", "<dictcomp>") and frame.f_back is not None:
        frame = frame.f_back
    names = (*frame.f_code.co_varnames[:1], *frame.f_code.co_freevars)
    return any(isinstance(frame.f_locals.get(name), nn.Module) for name in names)


def _watched(name: str) -> Callable[..., Any]:
    plain = getattr(TaggedInt, name)

    def method(self: Counter, *args: Any) -> Any:
        if not self.life.over and _in_module(1):
            self.used()
        return plain(self, *args)

    return method


for _name in ["eq", "ne", "lt", "le", "gt", "ge", "bool", "hash", "float", "neg", "divmod", "and", "or", "xor", "lshift", "rshift"]:
    setattr(Counter, f"__{_name}__", _watched(f"__{_name}__"))
for _name in ["add", "sub", "mul", "floordiv", "mod", "truediv", "pow"]:
    setattr(Counter, f"__{_name}__", _watched(f"__{_name}__"))
    setattr(Counter, f"__r{_name}__", _watched(f"__r{_name}__"))
