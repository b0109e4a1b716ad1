"""The tensors that code on parts reads stay there, and of their shape.

A bias that was None when the plan was made is in no plan: it would be added on every rank before the sum. A tensor that comes where a
number was, or that grows, meets a rank's part. Modules that run on parts are watched for both; new numbers are what a call reads anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

from autotp.errors import AutoTPError

_TABLES = ("_parameters", "_buffers")
_ADVICE = "Make the change before parallelize (build the model again), or take it back"
_NUMBER = "a number"
#: what is there under a name: the shape of a tensor, a number, nothing
Held = torch.Size | str | None


class Tensors:
    """What is watched of one module: its tables of tensors and, among its other attributes, the `names` of tensors and numbers.

    `read`: the names that its code reads and that no forward stores.
    """

    __slots__ = ("held", "kept", "module", "names", "read", "where")

    def __init__(self, path: str, module: nn.Module, read: frozenset[str]) -> None:
        self.where, self.module, self.read = f"{path}." if path else "", module, read
        self.names = tuple(n for n, v in module.__dict__.items() if n in read and (type(v) is float or isinstance(v, Tensor)))
        self.kept = self._now()
        self.held = {name: _held(value) for name, value in self._named()}

    def _now(self) -> list[tuple[Any, ...]]:
        attributes = self.module.__dict__
        tables = [(*attributes[table].values(),) for table in _TABLES]
        return [*tables, tuple([attributes.get(n) for n in self.names])] if self.names else tables

    def _named(self) -> Iterator[tuple[str, Any]]:
        attributes = self.module.__dict__
        for table in _TABLES:
            yield from ((n, v) for n, v in attributes[table].items() if n in self.read)
        yield from ((n, attributes.get(n)) for n in self.names if n in self.read)

    def check(self) -> None:
        """Raise where a tensor came or went, or has another shape.

        Raises:
            AutoTPError: names it.
        """
        now = self._now()
        for a, b in zip(now, self.kept, strict=True):
            if len(a) != len(b) or not all(map(is_, a, b)):
                break
        else:
            return
        found = {name: _held(value) for name, value in self._named()}
        for name in dict.fromkeys((*self.held, *found)):
            old, new = self.held.get(name), found.get(name)
            if old == new or (old == _NUMBER and isinstance(new, torch.Size) and new.numel() == 1):
                continue
            if new == _NUMBER and isinstance(old, torch.Size) and old.numel() == 1:
                continue
            raise AutoTPError(
                f"{self.where}{name} was {_told(old)} when the model was made parallel and is {_told(new)} now; the code that reads it "
                f"runs on a rank's part, by a plan made for what was there. {_ADVICE}"
            )
        self.kept = now


def _held(value: Any) -> Held:
    return value.shape if isinstance(value, Tensor) else _NUMBER if isinstance(value, (int, float)) else None


def _told(held: Held) -> str:
    return "None" if held is None else held if isinstance(held, str) else f"a tensor of shape {tuple(held)}"
