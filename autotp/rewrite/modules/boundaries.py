"""Converts single tensors inside the arguments and results of a module call."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from autotp.errors import PlanError
from autotp.plan.conversions import Conversion, Op
from autotp.plan.items import Items, Path, fits, stands_for_several, step_of
from autotp.plan.spec import Slot
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import Convert, bind_all
from autotp.rewrite.collectives.conversions import copy as copy_to
from autotp.rewrite.collectives.split import OTHER_PATH, OtherSize, Split
from autotp.rewrite.logits.logits import Show
from autotp.rewrite.modules.binding import Binding
from autotp.rewrite.modules.items import ArgumentItems, ResultItems
from autotp.rewrite.sequence.scatter import Scatter
from autotp.rewrite.sequence.tokens import ParallelTokens
from autotp.trace.boundary import copied


def map_path(value: Any, path: Path, fn: Convert) -> Any:
    """Returns `value` with `fn` applied to the tensor at `path`; containers on the way are copied, absent paths passed over."""
    if not path:
        return fn(value) if isinstance(value, Tensor) else value
    key, rest = path[0], path[1:]
    if isinstance(value, tuple | list):
        if key == "*":
            return _like(value, [map_path(item, rest, fn) for item in value])
        if not isinstance(key, int) or not -len(value) <= key < len(value):
            if isinstance(key, str) and key in getattr(value, "_fields", ()):
                return value._replace(**{key: map_path(getattr(value, key), rest, fn)})  # type: ignore[union-attr]
            return value
        items = list(value)
        items[key] = map_path(items[key], rest, fn)
        return _like(value, items)
    if isinstance(value, Mapping):
        if key not in value and isinstance(key, int) and 0 <= key < len(value):
            key = list(value)[key]  # a transformers ModelOutput is also indexed by position
        keys = [key] if key in value else [k for k in value if fits(step_of(k), (key,))]
        if not keys:
            return value
        changed: Any = copied(value)
        for k in keys:
            changed[k] = map_path(value[k], rest, fn)
        return changed
    if dataclasses.is_dataclass(value) and isinstance(key, str) and hasattr(value, key):
        changed = copy.copy(value)
        object.__setattr__(changed, key, map_path(getattr(value, key), rest, fn))
        return changed
    return value


def _like(value: Any, items: list[Any]) -> Any:
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


class InputSlots:
    """Converts at all input slots of one module."""

    __slots__ = ("alike", "bindings", "check", "converts", "where")

    def __init__(self, slots: Sequence[Slot], forward: Callable[..., Any], comm: Comm, where: str, items: Sequence[Items] = ()) -> None:
        self.where = where
        self.check = ArgumentItems(items, forward, where) if items else None
        self.bindings = tuple(Binding(slot.path, forward, where) for slot in slots)
        self.converts = tuple(_entering(slot.conversions, comm) for slot in slots)
        kinds = [slot.conversions for slot in slots]
        #: Bindings that convert as another one does: one tensor in two arguments stays one.
        self.alike = tuple(
            kinds.index(s.conversions) if kinds.count(s.conversions) > 1 or stands_for_several(s.path) else None for s in slots
        )

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the call's arguments after conversion; the caller's containers stay as they are.

        Raises:
            PlanError: one has not the size, or the number of items, that the plan knows.
        """
        if self.check is not None:
            self.check(args, kwargs)
        try:
            return self._converted(args, kwargs)
        except OtherSize as error:
            raise PlanError(f"{self.where} {OTHER_PATH}: {error}") from error

    def _converted(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        positional, keywords = list(args), dict(kwargs)
        made: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # the argument is kept, so that its id stays its own
        for b, own, kind in zip(self.bindings, self.converts, self.alike, strict=True):
            convert = own if kind is None else _Once(own, kind, made)
            if b.index is not None and b.index < len(positional):
                for i in range(b.index, len(positional) if b.every else b.index + 1):
                    positional[i] = map_path(positional[i], b.rest, convert)
            elif b.name in keywords:
                keywords[b.name] = map_path(keywords[b.name], b.rest, convert)
        return tuple(positional), keywords


class _Once:
    """Converts each tensor of a call once: one tensor in several arguments stays one."""

    __slots__ = ("convert", "kind", "made")

    def __init__(self, convert: Convert, kind: int, made: dict[tuple[int, int], tuple[Tensor, Tensor]]) -> None:
        self.convert, self.kind, self.made = convert, kind, made

    def __call__(self, x: Tensor) -> Tensor:
        key = id(x), self.kind
        if key not in self.made:
            self.made[key] = x, self.convert(x)
        return self.made[key][1]


def _combined(sums: Convert) -> Convert:
    """What leaves experts that are dealt whole: sums of this rank's tokens already where their tokens were dispatched."""
    return lambda x: x if type(x) is ParallelTokens else sums(x)


def _dispatched(comm: Comm) -> Convert:
    """What enters them: hidden states in token parts stay so until it is known who gets which (`autotp.rewrite.modules.pairs`)."""
    return lambda x: x if type(x) is ParallelTokens and not is_dynamo_compiling() else copy_to(x, comm)


def _entering(conversions: Sequence[Conversion], comm: Comm) -> Convert:
    return _dispatched(comm) if [c.op for c in conversions] == [Op.DISPATCH] else bind_all(conversions, comm)


def _bound(conversions: Sequence[Conversion], comm: Comm, scatter: Scatter | None) -> Convert:
    if [c.op for c in conversions] in ([Op.SCATTER], [Op.COMBINE]):
        sums = scatter or bind_all((Conversion(Op.REDUCE),), comm)
        return sums if conversions[0].op is Op.SCATTER else _combined(sums)
    if [c.op for c in conversions] == [Op.LAZY_GATHER]:
        (lazy,) = conversions
        assert lazy.expr is not None
        return Show(Split(-1, lazy.expr, comm))
    return bind_all(conversions, comm)


class OutputSlots:
    """Converts at all output slots of one module."""

    __slots__ = ("check", "slots")

    def __init__(self, slots: Sequence[Slot], comm: Comm, where: str, scatter: Scatter | None = None, items: Sequence[Items] = ()) -> None:
        self.check = ResultItems(items, where) if items else None
        self.slots = tuple((slot.path, _bound(slot.conversions, comm, scatter)) for slot in slots)

    def __call__(self, result: Any) -> Any:
        """Returns the module's result after conversion.

        Raises:
            PlanError: it has not the number of items that the plan knows.
        """
        if self.check is not None:
            self.check(result)
        for path, convert in self.slots:
            result = map_path(result, path, convert)
        return result
