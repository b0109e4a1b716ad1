"""Holds the recorded nodes, and knows where the running code is: in which module, Python call and autograd function.

Every part of the recorder appends to one `Tape`, so the order of its nodes is that of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

from autotp.trace.graph import Node, Place, PythonCall, Value
from autotp.trace.watch import is_running

#: A value of `Tape.apart`: why code that a checkpoint runs is apart from its module's forward.
AGAIN = "it runs in a checkpointed function, whose second run, in the backward, is outside of the module's forward"


class Caller(NamedTuple):
    """The call that runs, as the code wrote it: raw ints, before the dispatcher."""

    args: Any
    kwargs: Any
    place: Place


class Paused:
    """The context in which a tape is paused. Each boundary of a module enters one, so it is no generator."""

    __slots__ = ("_tape",)

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __enter__(self) -> None:
        self._tape.quiet += 1

    def __exit__(self, *error: object) -> None:
        self._tape.quiet -= 1


class Tape:
    """Holds the nodes in the order of the run."""

    def __init__(self, hidden: Callable[[str], bool]) -> None:
        """`hidden(file)`: calls made from such a file are run but not recorded."""
        self.hidden = hidden
        self.nodes: list[Node] = []
        self.modules: list[tuple[str, int]] = [("", 0)]  # (path, frame) of the calls of modules that run, the innermost last
        self.frames: dict[int, tuple[str, int]] = {}  # frame → (path of its module, frame of the caller)
        self.caller: Caller | None = None
        self.apart = ""  # why that call is made apart from the module's forward
        self.number = 0  # of Python calls so far
        self.python: dict[int, PythonCall] = {}
        self.quiet = 0
        self._scopes: list[tuple[FrameType, int]] = []  # calls of autograd functions that run
        self._made = 0  # frames so far

    @property
    def module(self) -> str:
        """Returns the path of the innermost module whose forward runs."""
        return self.modules[-1][0]

    def add(self, op: Any, args: Any, kwargs: Any, outputs: tuple[Value, ...], **more: Any) -> Node:
        """Append a node at the current module."""
        module, frame = self.modules[-1]
        apart = self.apart if self.caller is not None else ""
        node = Node(len(self.nodes), op, args, kwargs, outputs, module, frame, scope=self._scope(), apart=apart, **more)
        self.nodes.append(node)
        return node

    def last(self) -> Node | None:
        """Returns the node that was recorded last."""
        return self.nodes[-1] if self.nodes else None

    def inside(self, path: str, run: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Returns the result of `run`, the forward of the module at `path`."""
        self._made += 1
        self.frames[self._made] = (path, self.modules[-1][1])
        self.modules.append((path, self._made))
        held, self.caller = self.caller, None
        try:
            return run(*args, **kwargs)
        finally:
            self.modules.pop()
            self.caller = held

    def scoped(self, frame: FrameType, scope: int) -> None:
        """Puts the nodes that are recorded until `frame` returns into the scope of this number."""
        self._scopes.append((frame, scope))

    def _scope(self) -> int:
        while self._scopes and not is_running(self._scopes[-1][0]):
            self._scopes.pop()
        return self._scopes[-1][1] if self._scopes else -1

    def paused(self) -> Paused:
        """Runs operators inside without recording them."""
        return Paused(self)

    def rewind(self, mark: int) -> None:
        """Forget the nodes after the first `mark` ones; no call of the model runs any more."""
        del self.nodes[mark:]
        self.modules[1:] = []
        self._scopes = []
        self.caller = None
