"""Refuses calls with containers of another length or other keys than traced ones, where the plan converts items by their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from autotp.errors import PlanError
from autotp.plan.items import DICT, Items, Path, Step, fits
from autotp.rewrite.modules.binding import Binding
from autotp.trace.containers import holds_tensors, items_of, length_of

_WHY = (
    "Not all of what is in it is alike over the ranks, so the plan does not know what stands where. Pass example_inputs of such a call to "
    "parallelize as well (a list of several calls)"
)


class Known:
    """What the container at `path` of an argument or a result may be like."""

    __slots__ = ("known", "path", "unnamed", "where")

    def __init__(self, items: Items, path: Path, where: str) -> None:
        self.known: Mapping[int, tuple[Step, ...]] = dict(items.known)
        self.path, self.unnamed = path, items.unnamed
        name = ".".join(map(str, items.path))
        self.where = f"{where} returns{f', at {name},' if name else ''}" if items.result else f"{where} is called with {name} as"

    def check(self, value: Any) -> None:
        """Check all containers of a value that `path` stands for.

        Raises:
            PlanError: one is as in no traced call.
        """
        self._at(value, self.path)

    def _at(self, value: Any, path: Path) -> None:
        if path:
            for step, item in items_of(value):
                if fits(step, path[:1]):
                    self._at(item, path[1:])
            return
        length = length_of(value)
        if length is None:
            return
        if self.unnamed:
            for depth, dims in _tensors(value):
                if (depth, dims) in self.unnamed:
                    kind = _described(length, ())
                    raise PlanError(f"{self.where} {kind}; in the calls that were traced it had fields with names. {_WHY}")
            return
        steps = [step for step, item in items_of(value) if holds_tensors(item)]
        known = self.known.get(length, ())
        if any(not fits(step, known) for step in steps):
            raise PlanError(f"{self.where} {_described(length, steps)}; in the calls that were traced it was {self._traced()}. {_WHY}")

    def _traced(self) -> str:
        return " or ".join(_described(length, steps) for length, steps in self.known.items())


def _described(length: int, steps: Sequence[Step]) -> str:
    kind = "a dict" if length == DICT else f"a list or tuple of {length}"
    return f"{kind} with tensors at {', '.join(map(repr, steps))}" if steps else kind


def _tensors(value: Any, depth: int = 0) -> list[tuple[int, int]]:
    """Returns how deep in a container each tensor is, and how many dims it has."""
    if isinstance(value, Tensor):
        return [(depth, value.dim())]
    return [found for _, item in items_of(value) for found in _tensors(item, depth + 1)]


class ArgumentItems:
    """Checks the arguments of one module."""

    __slots__ = ("checks",)

    def __init__(self, items: Sequence[Items], forward: Callable[..., Any], where: str) -> None:
        bindings = [(Binding(i.path, forward, where), i) for i in items if not i.result]
        self.checks = tuple((binding, Known(i, i.path[1:] if binding.every else binding.rest, where)) for binding, i in bindings)

    def __call__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Raises PlanError where an argument is as in no traced call."""
        for binding, known in self.checks:
            known.check(binding.given(args, kwargs))


class ResultItems:
    """Checks the results of one module."""

    __slots__ = ("checks",)

    def __init__(self, items: Sequence[Items], where: str) -> None:
        self.checks = tuple(Known(i, i.path, where) for i in items if i.result)

    def __call__(self, result: Any) -> None:
        """Raises PlanError where a result is as in no traced call."""
        for known in self.checks:
            known.check(result)
