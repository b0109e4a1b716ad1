"""Defines the traced graph, with values, nodes and module boundaries as plain data.

A `Node` is one ATen operator call, or a pseudo-operator for an event that operators do not show. ENTER and EXIT: a tensor crosses a
module boundary, identity. REPEAT: a block alike to one already traced was called. APPLY and HOOK: gradients pass code that the
forward does not show.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from types import CodeType
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from autotp.plan.spec import Forms
from autotp.trace.containers import Container
from autotp.trace.ints import Compared, IntExpr


class Pseudo(Enum):
    """Nodes that are no operator."""

    ENTER = "enter"
    EXIT = "exit"
    REPEAT = "repeat"
    ESCAPE = "escape"  # a tensor goes where operators cannot be recorded (inside vmap)
    BATCHED = "vmap"  # a vmap makes tensors of those that escaped into it
    WRITE = "write"  # an in-place operator changed this alias of its target
    APPLY = "apply"  # tensors go into an autograd.Function; its operators follow, with the same scope
    HOOK = "hook"  # code of the model sees the gradient of a tensor


class Origin(Enum):
    """Where a value comes from."""

    PARAM = "param"
    BUFFER = "buffer"
    INPUT = "input"
    CONST = "const"
    NODE = "node"


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """One tensor of the trace. `name` is the fqn of a parameter or buffer, the keyword of an input."""

    id: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: Origin
    name: str = ""

    def __repr__(self) -> str:
        return f"v{self.id}{list(self.shape)}" + (f"={self.name}" if self.name else "")


@dataclass(frozen=True, slots=True)
class Place:
    """Where in the code a call was made; equal places are the same instruction."""

    file: str
    function: str
    line: int
    offset: int
    lineno: int = field(compare=False)

    @staticmethod
    def of(code: CodeType, offset: int, lineno: int) -> Place:
        """Returns the place of instruction `offset` of `code`."""
        return Place(code.co_filename, code.co_qualname, code.co_firstlineno, offset, lineno)

    def __str__(self) -> str:
        return f"{self.file.rsplit('site-packages/', 1)[-1]}:{self.lineno} in {self.function}"


@dataclass(frozen=True, slots=True)
class Random:
    """Stands for a `torch.Generator` among the arguments of a call, as it was when the call was made: equal ones draw the same
    numbers.

    The object itself says nothing: code may make a new one in every forward, or seed one again and again.
    """

    device: str
    state: bytes

    @staticmethod
    def of(generator: torch.Generator) -> Random:
        """Returns the present state of `generator`."""
        with unset_fake_temporarily():
            return Random(str(generator.device), generator.get_state().numpy().tobytes())

    def __repr__(self) -> str:
        return f"a random generator ({self.device})"


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """One call. `args`/`kwargs` hold `Value`s where the call had tensors, a `Random` where it had a generator.

    `module` is the path of the innermost module whose forward was running, `frame` a number that tells calls of modules apart.
    `ints` are the call's Python int arguments in order (as written in the code, before the dispatcher), with provenance.
    `slot` is (module path, path in its arguments or result) for ENTER and EXIT. Paths of arguments that were one tensor in some call
    are one slot, named by the first of them: see `Graph.members`. `scope` is the number of the `Scope` that the node runs in, -1 for none.
    `apart`: why the module's forward is not around it when it runs ("" where it is).
    """

    index: int
    op: torch._ops.OpOverload | Pseudo
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[Value, ...]
    module: str
    frame: int
    place: Place | None = None
    ints: tuple[IntExpr, ...] = ()
    slot: tuple[str, tuple[str | int, ...]] | None = None
    tensors: tuple[int, ...] = ()  # ids of the call's tensor arguments in the order of the Python call
    call: int = -1  # nodes of one Python call share this number
    scope: int = -1
    apart: str = ""
    opname: str = field(init=False, repr=False)  # `linear`, `view`, …: the operator's name without namespace and overload
    _inputs: tuple[Value, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        name = self.op.value if isinstance(self.op, Pseudo) else self.op._schema.name.rsplit("::", 1)[-1]
        object.__setattr__(self, "opname", name)
        object.__setattr__(self, "_inputs", (*values_in(self.args), *values_in(tuple(self.kwargs.values()))))

    def inputs(self) -> Iterator[Value]:
        """Returns every value among the arguments, in order."""
        return iter(self._inputs)

    def __str__(self) -> str:
        return f"{self.opname} in {self.module or '<root>'}" + (f" ({self.place})" if self.place else "")


def values_in(tree: Any) -> Iterator[Value]:
    """Yields the values in a nest of tuples, lists and dicts."""
    if isinstance(tree, Value):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from values_in(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from values_in(item)


@dataclass(frozen=True, slots=True)
class Scope:
    """One call of an autograd.Function: operators whose backward is code of its own.

    shown: the backward was run, and gives the result of autograd on the forward's operators. local: dims, counted from the last
    (-1), along which forward and backward were run and treat each element by itself.
    """

    name: str
    shown: bool
    local: frozenset[int]


@dataclass(frozen=True, slots=True)
class Result:
    """One traced path returned this to its caller: leaves with their paths (values, or plain Python scalars).

    training: the path ran in training mode. drawn: along numbers drawn for its data (`autotp.trace.draw`).
    """

    name: str
    leaves: tuple[tuple[tuple[str | int, ...], Any], ...]
    stop: int  # number of nodes recorded when the path ended
    training: bool = False
    drawn: bool = False


@dataclass(frozen=True, slots=True)
class PythonCall:
    """A call of the code that one node or several were recorded for: the function's name, ids of the tensors in its result in order."""

    function: str
    results: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Access:
    """A module's code gets at a parameter so: as the attribute `name` of its owner, or `held`: as the object that anyone may hold."""

    name: str
    held: bool


@dataclass(frozen=True, slots=True)
class Graph:
    """A trace of one or more paths through a model.

    `params`/`buffers`: fqn → Value (tied names share a value). `repeats`: path of a block → path of the alike block that was
    traced in its place. `members`: slot of an ENTER → the argument paths that it stands for, where these are several.
    """

    nodes: tuple[Node, ...]
    params: Mapping[str, Value]
    buffers: Mapping[str, Value]
    results: tuple[Result, ...]
    repeats: Mapping[str, str]
    fills: Mapping[int, float]  # value id → number, for constants filled with one value
    notes: tuple[str, ...] = ()
    constants: Mapping[int, torch.Tensor] = field(default_factory=dict)  # value id → the numbers of small constants
    calls: Mapping[int, tuple[str, int]] = field(default_factory=dict)  # frame → (path of its module, frame of the caller)
    accesses: Mapping[tuple[str, int], tuple[Access, ...]] = field(default_factory=dict)  # (module, value id of a parameter) → its ways
    python: Mapping[int, PythonCall] = field(default_factory=dict)  # `Node.call` → the call
    members: Mapping[tuple[str, tuple[str | int, ...]], tuple[tuple[str | int, ...], ...]] = field(default_factory=dict)
    scopes: tuple[Scope, ...] = ()
    refilled: frozenset[str] = frozenset()  # modules that change a list or dict that they are called with
    left: Mapping[tuple[str, str], tuple[Value, ...]] = field(default_factory=dict)  # (module, attribute) → what forwards leave there
    forms: Mapping[str, Forms] = field(default_factory=dict)  # module → how it was called
    containers: Mapping[str, frozenset[Container]] = field(default_factory=dict)  # module → what it was called with or returned
    asks_dims: frozenset[str] = frozenset()  # modules whose code reads sizes or numbers of dims
    sized: frozenset[int] = frozenset()  # ids of the values whose sizes code has read
    compared: tuple[Compared, ...] = ()  # comparisons of ints in the model's code
    read: frozenset[float] = frozenset()  # numbers that code had from data
    chosen: frozenset[IntExpr] = frozenset()  # numbers that code may have had in the place of one made of sizes
    swapped: frozenset[tuple[str, str]] = frozenset()  # (path, class) of each module that a forward put in place of another
    untrained: str = ""  # why no path in training mode could be traced, where one was tried

    def sealed(self, node: Node) -> str:
        """Says why no conversion can act inside or at the result of a node; "" where one can."""
        if node.scope >= 0:
            return f"{self.scopes[node.scope].name} has a backward of its own"
        if node.apart:
            return node.apart
        if node.place is not None and node.place.file.startswith("<eval_with_key>"):
            return "it runs in code that torch.fx made, whose name is another on each rank"
        return "it runs outside of the model's forward, in a hook or a method" if outside(node) else ""


def outside(node: Node) -> bool:
    """True for an operator that no call of a module contains: a hook of the root makes it, or a method that is called past its forward."""
    return node.frame == 0 and node.op not in (Pseudo.ENTER, Pseudo.EXIT, Pseudo.WRITE)
