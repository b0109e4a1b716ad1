"""Checks that the tensors that code on parts reads stay there, and keep their shape.

A bias that was None when the plan was made is in no plan: it would be added on every rank before the sum. A tensor in place of a
number, or one that grows, would meet a rank's part. Modules that run on parts are watched for both. New numbers in a tensor are
fine: a call reads them anyway.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp.errors import AutoTPError, ChangedError
from autotp.rewrite.guards.averages import averaging
from autotp.rewrite.parameters.data_parallel import NO_DDP
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor

_TABLES = ("_parameters", "_buffers")
_ADVICE = "Make the change before parallelize (build the model again), or take it back"
_NUMBER = "a number"
#: what is there under a name: the shape of a tensor, a number, nothing
Held = torch.Size | str | None


class Tensors:
    """Watches the tensors of some modules. One check of all of them is cheap; only where it fails, the module is looked for."""

    __slots__ = ("kept", "places", "tables")

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)
        self._keep()

    def _keep(self) -> None:
        self.tables = [p.module.__dict__[table] for p in self.places for table in _TABLES]
        self.kept = self._now()

    def _now(self) -> list[Any]:
        now = [*chain.from_iterable([table.values() for table in self.tables])]
        for place in self.places:
            if place.names:
                attributes = place.module.__dict__
                now += [attributes.get(name) for name in place.names]
        return now

    def check(self) -> None:
        """Raise where a tensor was added or removed, or has another shape.

        Raises:
            AutoTPError: names it.
        """
        now = self._now()
        if len(now) != len(self.kept) or not all(map(is_, now, self.kept)):
            for place in self.places:
                place.check()
            self._keep()


class Place:
    """Watches one module: its tables of tensors and, among its other attributes, the `names` of tensors and numbers.

    `read`: the names that its code reads and that no forward stores. `laid`: those of parameters with a layout; the code that reads
    them checks their shapes.
    """

    __slots__ = ("held", "laid", "module", "names", "read", "where")

    def __init__(self, path: str, module: nn.Module, read: frozenset[str]) -> None:
        self.where, self.module, self.read = f"{path}." if path else "", module, read
        names = read - averaging(module)
        found = (n for n, v in module.__dict__.items() if n in names and (type(v) is float or isinstance(v, Tensor)))
        self.names = tuple(n for n in found if not hasattr(inspect.getattr_static(type(module), n, None), "__set__"))  # see `stash`
        self.laid = frozenset(n for n, p in module._parameters.items() if isinstance(p, LayoutDTensor))
        self.held = self._look()

    def _look(self) -> dict[str, Held]:
        attributes = self.module.__dict__
        found = {n: v for table in _TABLES for n, v in attributes[table].items() if n in self.read}
        return {name: _held(value) for name, value in (found | {n: attributes.get(n) for n in self.names}).items()}

    def check(self) -> None:
        """Checks this module as `Tensors.check` does."""
        found = self._look()
        for name in dict.fromkeys((*self.held, *found)):
            old, new = self.held.get(name), found.get(name)
            if old == new or (name in self.laid and new is not None) or (_NUMBER in (old, new) and (_is_one(old) or _is_one(new))):
                continue
            if new is None and isinstance(self.module.__dict__.get(name), DTensor):
                raise AutoTPError(
                    f"{self.where}{name} is no parameter of its module any more, but an attribute. Write its values into the parameter "
                    f"instead (with torch.no_grad(): parameter.copy_(values)), or change the module before parallelize. {NO_DDP}"
                )
            raise ChangedError(
                f"{self.where}{name} was {_told(old)} when the model was made parallel and is {_told(new)} now; the code that reads it "
                f"runs on a rank's part, by a plan made for what was there. {_ADVICE}"
            )


def _is_one(held: Held) -> bool:
    return isinstance(held, torch.Size) and held.numel() == 1


def _held(value: Any) -> Held:
    return value.shape if isinstance(value, Tensor) else _NUMBER if isinstance(value, (int, float)) else None


def _told(held: Held) -> str:
    return "None" if held is None else held if isinstance(held, str) else f"a tensor of shape {tuple(held)}"
