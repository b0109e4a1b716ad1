"""Converts single tensors inside the arguments and results of a module call."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from autotp.errors import PlanError
from autotp.plan.conversions import Conversion, Op
from autotp.plan.spec import Slot
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import Convert, bind_all
from autotp.rewrite.collectives.conversions import copy as copy_to
from autotp.rewrite.collectives.split import OTHER_PATH, OtherSize, Split
from autotp.rewrite.logits.logits import Show
from autotp.rewrite.sequence.scatter import Scatter
from autotp.rewrite.sequence.tokens import ParallelTokens
from autotp.trace.boundary import copied

Path = tuple[str | int, ...]


def map_path(value: Any, path: Path, fn: Convert) -> Any:
    """Returns `value` with `fn` applied to the tensor at `path`; containers on the way are copied, absent paths passed over."""
    if not path:
        return fn(value) if isinstance(value, Tensor) else value
    key, rest = path[0], path[1:]
    if key == "*" and isinstance(value, tuple | list):
        for i in range(len(value)):
            value = map_path(value, (i, *rest), fn)
        return value
    if isinstance(value, tuple | list):
        if not isinstance(key, int) or not -len(value) <= key < len(value):
            if isinstance(key, str) and key in getattr(value, "_fields", ()):
                return value._replace(**{key: map_path(getattr(value, key), rest, fn)})  # type: ignore[union-attr]
            return value
        items = list(value)
        items[key] = map_path(items[key], rest, fn)
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, Mapping):
        if key not in value and isinstance(key, int) and 0 <= key < len(value):
            key = list(value)[key]  # a transformers ModelOutput is also indexed by position
        if key not in value:
            return value
        changed: Any = copied(value)
        changed[key] = map_path(value[key], rest, fn)
        return changed
    if dataclasses.is_dataclass(value) and isinstance(key, str) and hasattr(value, key):
        changed = copy.copy(value)
        object.__setattr__(changed, key, map_path(getattr(value, key), rest, fn))
        return changed
    return value


class Binding:
    """Finds where an argument stands in a call of `forward`. rest: the path of a tensor inside of the argument."""

    __slots__ = ("index", "name", "rest")

    def __init__(self, path: Path, forward: Callable[..., Any], where: str) -> None:
        if not path or not isinstance(path[0], str):
            raise PlanError(f"{where}: an input slot starts with an argument's name, got path {path}")
        name, rest = path[0], path[1:]
        parameters = list(inspect.signature(forward).parameters.values())
        if parameters and parameters[0].name == "self":
            parameters = parameters[1:]
        index: int | None = None
        takes_any = False
        for i, p in enumerate(parameters):
            if p.kind is p.VAR_POSITIONAL and p.name == name:
                if not rest or not isinstance(rest[0], int):
                    raise PlanError(f"{where}: a slot in *{name} needs a position, got path {path}")
                index, rest = i + rest[0], rest[1:]
                break
            if p.kind is p.VAR_KEYWORD:
                takes_any = True
                if p.name == name and rest and isinstance(rest[0], str):
                    name, rest = rest[0], rest[1:]
            elif p.name == name and p.kind is not p.KEYWORD_ONLY:
                index = i
                break
            elif p.name == name:
                takes_any = True
        if index is None and not takes_any:
            raise PlanError(f"{where}: forward has no argument {name!r}; it takes {[p.name for p in parameters]}")
        self.index, self.name, self.rest = index, name, rest

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Returns the argument in a call, None where it is left out."""
        return args[self.index] if self.index is not None and self.index < len(args) else kwargs.get(self.name)


class InputSlots:
    """Converts at all input slots of one module."""

    __slots__ = ("alike", "bindings", "converts", "where")

    def __init__(self, slots: Sequence[Slot], forward: Callable[..., Any], comm: Comm, where: str) -> None:
        self.where = where
        self.bindings = tuple(Binding(slot.path, forward, where) for slot in slots)
        self.converts = tuple(_entering(slot.conversions, comm) for slot in slots)
        kinds = [slot.conversions for slot in slots]
        #: Bindings that convert as another one does: one tensor in two arguments stays one.
        self.alike = tuple(kinds.index(kind) if kinds.count(kind) > 1 else None for kind in kinds)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the call's arguments after conversion; the caller's containers stay as they are.

        Raises:
            PlanError: one has not the size that the plan knows.
        """
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
                positional[b.index] = map_path(positional[b.index], b.rest, convert)
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

    __slots__ = ("slots",)

    def __init__(self, slots: Sequence[Slot], comm: Comm, scatter: Scatter | None = None) -> None:
        self.slots = tuple((slot.path, _bound(slot.conversions, comm, scatter)) for slot in slots)

    def __call__(self, result: Any) -> Any:
        """Returns the module's result after conversion."""
        for path, convert in self.slots:
            result = map_path(result, path, convert)
        return result
