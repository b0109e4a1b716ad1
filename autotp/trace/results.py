"""Closes a path: finds what it returned and left behind, and which of the recorded nodes those and later ones need."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from autotp.trace.boundary import flatten_result
from autotp.trace.graph import Node, Pseudo, Result, Value
from autotp.trace.tape import Tape
from autotp.trace.values import Values


class Results:
    """Keeps the paths that are closed, in order, and the tensors that they left on modules: (module, attribute) → values by id."""

    def __init__(self, tape: Tape, values: Values) -> None:
        self.closed: list[Result] = []
        self.left: dict[tuple[str, str], dict[int, Value]] = {}
        self._tape, self._values = tape, values

    def close(self, name: str, training: bool, result: Any, left: Iterable[tuple[str, str, Value]] = (), *, drawn: bool = False) -> None:
        """Close one path: note its result, and the tensors that it `left` on modules (see `stash`).

        A tensor left on the root is like a result: its class stays, so nothing keeps its user from reading it.
        """
        found: list[tuple[tuple[str | int, ...], Any]] = []

        def tensor(where: tuple[str | int, ...], t: Tensor) -> Tensor:
            found.append((where, self._values.of(t)))
            return t

        flatten_result(result, tensor, lambda where, x: found.append((where, x)))
        for path, attribute, value in left:
            if path:
                self.left.setdefault((path, attribute), {})[value.id] = value
            else:
                found.append((("the attribute", attribute), value))
        self.closed.append(Result(name, tuple(found), len(self._tape.nodes), training, drawn))

    def rewind(self, done: int) -> None:
        """Forget all paths but the first `done` ones."""
        del self.closed[done:]

    def alive(self) -> tuple[tuple[Node, ...], tuple[Result, ...]]:
        """Returns the nodes without versions of aliases that nothing reads, and the results as they lie among them."""
        used = {leaf.id for result in self.closed for _, leaf in result.leaves if isinstance(leaf, Value)}
        used.update(v.id for values in self.left.values() for v in values.values())
        kept: list[Node] = []
        counts: list[int] = []
        for node in reversed(self._tape.nodes):
            if node.op is Pseudo.WRITE and not any(o.id in used for o in node.outputs):
                continue
            used.update(v.id for v in node.inputs())
            kept.append(node)
            counts.append(node.index)
        kept.reverse()
        counts.reverse()
        final = tuple(replace(result, stop=bisect_left(counts, result.stop)) for result in self.closed)
        return tuple(replace(node, index=i) for i, node in enumerate(kept)), final
