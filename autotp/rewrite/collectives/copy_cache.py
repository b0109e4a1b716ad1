"""Keeps one entering copy for all the linears that read the same tensor.

The copy of `x` into a region is the identity; its backward all-reduces. If q, k and v each made their own copy, the backward would
all-reduce three times; with one shared copy, autograd adds their gradients first. Entries are keyed by the tensor's identity and
checked by weak reference and version. So a miss costs one more collective and a wrong hit cannot happen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor


class CopyMemo:
    """Maps a tensor to its copy inside the region, for as long as the tensor lives."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> CopyMemo:
        return CopyMemo()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, x: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the copy of `x`, made with `make` unless one made from this very tensor and version is alive."""
        key = id(x)
        entry = self._entries.get(key)
        if entry is not None and entry[0]() is x and entry[1] == x._version:
            return entry[2]
        copy = make(x)
        if x.grad_fn is None:  # a leaf is kept alive by its copy's graph: an entry would never be cleared
            return copy
        entries = self._entries

        def clear(dead: weakref.ref[Tensor]) -> None:
            found = entries.get(key)
            if found is not None and found[0] is dead:
                del entries[key]

        entries[key] = (weakref.ref(x, clear), x._version, copy)
        return copy
