"""The table of operators: one entry each, with its rule and everything else that the planner knows of it.

A rule says which dims are one axis, what is summed over and what stays whole. `Padded` says what becomes of padding, `Is` lists
what else an operator is. Nothing outside of this package decides on the name of an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, Flag, auto
from typing import Any

from autotp.axes import atoms
from autotp.axes.analysis import Context, Rule
from autotp.axes.atoms import Dim
from autotp.trace.graph import Node, Pseudo, Value


class Padded(Enum):
    """What an operator makes of the padding of its arguments; `autotp.planner.padding` follows it through the graph."""

    MOVED = "the result's is the arguments': elements are chosen, moved or copied"
    PRODUCT = "zero where that of one factor is, and nothing else is added"
    AS_FIRST = "zero where that of the first argument is, and nothing else is added"
    ATTENDED = "zero where that of the third argument is: values of an attention"
    NORMED = "zero where that of the first argument is; 0 / 0 where the second argument has padding too"
    SOLVED = "zero where that of the right side is, if the matrix has ones on its diagonal"
    ZERO = "zero for zeros, finite for finite numbers"
    FINITE = "finite for finite numbers"
    TOTAL = "elementwise; it and its derivative are finite wherever the arguments are"
    MULTIPLIED = "elementwise; zero where one factor is"
    DIVIDED = "elementwise; finite where what it is divided by is known not to be zero"
    CHOSEN = "elementwise; that of both branches, where it is the same"
    POWER = "elementwise; finite for whole powers of at least 1"
    UNKNOWN = "elementwise operators are run on known numbers; there is no telling of others"


class Is(Flag):
    """What else an operator is."""

    NOTHING = 0
    SELECTION = auto()  # the result is made of elements of the first argument
    IDENTITY = auto()  # the result is the elements of the first argument in order, as long as their number and dtype stay
    PASSES_SCORES = auto()  # scores pass it on their way to a softmax, and probabilities on their way from it
    PASSES_ARGUMENTS = auto()  # it passes an argument of the model on
    PRODUCT = auto()  # its parameters are weights of products
    MAKES_SCORES = auto()  # a product of two activations may be attention scores
    MATRIX_PRODUCT = auto()  # a product of two activations over the last dim of the first
    SOFTMAX = auto()
    ATTENTION = auto()
    LOOKUP = auto()  # rows of a table
    CONVOLUTION = auto()
    ALIGNED = auto()  # the strides of its operands are multiples of 16 bytes, 8 numbers of 16 bits
    ON_LAST_DIM = auto()  # it works on the last dim of any number of dims
    SUM = auto()
    DIFFERENCE = auto()
    FILLS = auto()  # it puts zeros, or the number `at` its position, beside elements
    MIXES = auto()  # it puts elements of several arguments together
    CUTS = auto()  # its numbers say where a dim is cut
    MAY_BE_EMPTY = auto()  # nothing may be left of a cut; what is cut can be sharded all the same
    DROPOUT = auto()  # in eval mode it returns its argument, which its schema does not say
    FRESH = auto()  # nobody else has its argument
    DETACHES = auto()  # no gradient passes it
    UPDATES_STATISTICS = auto()  # in training it changes its arguments 3 and 4, which its schema does not say


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator. `at`: position of the argument that counts for padding: what is added, the number filled in, the mask of a choice."""

    rule: Rule
    padded: Padded = Padded.UNKNOWN
    traits: Is = Is.NOTHING
    at: int | None = None


#: Base name of an ATen operator (`add`, `view`) or a node without one → its entry. The rooms of this package fill it when they are
#: imported, `autotp.axes.find` imports all of them.
OPERATORS: dict[str | Pseudo, Operator] = {}


def rule(*names: str | Pseudo, padded: Padded = Padded.UNKNOWN, traits: Is = Is.NOTHING, at: int | None = None) -> Callable[[Rule], Rule]:
    """Enter operators into the table, with this function as their rule."""

    def register(function: Rule) -> Rule:
        for name in names:
            assert name not in OPERATORS, f"two rules for {name}"
            OPERATORS[name] = Operator(function, padded, traits, at)
        return function

    return register


def entry(node: Node) -> Operator | None:
    """The entry of a node's operator, None where it has none."""
    return OPERATORS.get(node.op if isinstance(node.op, Pseudo) else node.opname)


def is_a(node: Node, traits: Is) -> bool:
    """True where a node's operator is one of `traits`."""
    found = entry(node)
    return found is not None and found.traits._value_ & traits._value_ != 0  # numbers: flags are combined slowly, and planning asks often


def arg(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of an ATen call by position or keyword."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def dim_of(index: int, value: Value) -> int:
    """A dim index counted from the front."""
    return index % max(len(value.shape), 1)


def dims_of(index: Any, value: Value) -> list[int]:
    """A dim index or list of them counted from the front; None or [] means all."""
    if index is None or index == []:
        return list(range(len(value.shape)))
    return [dim_of(i, value) for i in (index if isinstance(index, (list, tuple)) else [index])]


def broadcast(context: Context, values: list[Value], out: Value) -> None:
    """Join the operands' dims from the right; a size-1 dim constrains nothing."""
    dims: list[Dim] = []
    for i, size in enumerate(out.shape):
        carrying: list[tuple[Value, Dim]] = []
        for value in values:
            j = i - (len(out.shape) - len(value.shape))
            if j >= 0 and value.shape[j] == size and size != 1:
                carrying.append((value, context.of(value)[j]))
        for value, dim in carrying[1:]:
            context.join(*carrying[0], value, dim)
        dims.append(carrying[0][1] if carrying else atoms.new(size))
    context.set(out, dims)
