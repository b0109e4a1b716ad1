"""Lists the variants of a small model in the idioms of other people's code, as values.

A part makes values between its weights (`up`), changes them (`lines`), and makes its result of them. Further choices are ways to
hold the weights, to call the part, to repeat it, and changes from outside. Every combination is a model that runs on one device. A
plan must be right for it, or autotp must refuse it (`autotp.testing.outcome`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from autotp.errors import InputError
from autotp.testing.idioms.lines import LINES


class Up(Enum):
    """The ways to make the values between the weights."""

    LINEAR = "linear"
    GATED = "gated"
    CONV = "conv"  # over time, one step
    CONV_WIDE = "conv_wide"  # three steps
    ATTENTION = "attention"  # the fused operator; groups are heads
    WRITTEN = "written"  # products and a softmax
    CAUSAL = "causal"  # fused and causal, queries are learned
    LOOKUP = "lookup"  # a Linear and a table
    RECURRENT = "recurrent"  # a loop over time
    TORCH_ATTENTION = "torch_attention"  # nn.MultiheadAttention
    TORCH_LAYER = "torch_layer"  # nn.TransformerEncoderLayer
    MASKED = "masked"  # the fused operator, with a mask of each head that is made of the argument
    TORCH_MASKED = "torch_masked"  # nn.MultiheadAttention with such a mask
    LSTM = "lstm"
    HEADS = "heads"  # modules, each with the projections of one


class Weights(Enum):
    """The ways to read the weights. With another `Up` than linear it says how the last one is read."""

    MODULES = "modules"
    FUNCTIONAL = "functional"  # F.linear(x, self.a.weight)
    FORWARD = "forward"  # self.a.forward
    UNBOUND = "unbound"  # nn.Linear.forward(self.a, x)
    LIST = "list"
    DICT = "dict"
    PARTIAL = "partial"  # functools.partial made in __init__
    NAMED = "named"  # dict(self.named_parameters())
    PARAMETERS = "parameters"  # self.a._parameters
    TRANSPOSED = "transposed"  # x @ self.a.weight.t()
    TIED = "tied"  # the last weight is the first one, transposed


class Call(Enum):
    """The ways in which the model calls a part."""

    PLAIN = "plain"
    FORWARD = "forward"
    TYPE = "type"  # type(m).forward(m, x)
    METHOD = "method"
    MAPPED = "mapped"
    CHECKPOINT = "checkpoint"
    REENTRANT = "reentrant"
    TWICE = "twice"  # one tensor as two arguments
    KEYWORDS = "keywords"
    LISTED = "listed"
    NESTED = "nested"
    TUPLE = "tuple"  # a NamedTuple goes in
    DATACLASS = "dataclass"


class Repeat(Enum):
    """The number of parts, and their container."""

    ONE = "one"
    LIST = "list"
    NESTED = "nested"  # lists in a list
    DICT = "dict"
    SEQUENTIAL = "sequential"  # indexed
    SHARED = "shared"  # one part, called twice


class Differ(Enum):
    """In what the second part of several differs."""

    NOT = "not"
    ARGUMENT = "argument"
    FUNCTION = "function"  # an attribute
    METHOD = "method"  # another one is called
    USE = "use"  # its result goes through a softmax


class Around(Enum):
    """The idioms around the parts."""

    WEIGHT_HOOK = "weight_hook"
    MIXING_WEIGHT_HOOK = "mixing_weight_hook"
    POST_ACCUMULATE = "post_accumulate"
    FORWARD_HOOK = "forward_hook"
    PRE_HOOK = "pre_hook"
    BACKWARD_HOOK = "backward_hook"
    GATE = "gate"  # a flag that is off while tracing; then a further call has it on
    BATCH_NORM = "batch_norm"
    CUMULATIVE_NORM = "cumulative_norm"
    AVERAGE = "average"  # a moving average of one number
    AVERAGES = "averages"  # of each entry
    COUNTER = "counter"
    STASH = "stash"  # the part leaves its values on itself, the model reads them
    FROZEN = "frozen"
    IN_PLACE = "in_place"  # the residual is added into the result
    INNER = "inner"  # the values between the weights are among the results
    PLAIN_INPUT = "plain_input"  # no norm before the part
    WEIGHT_NORM = "weight_norm"  # of the first weight
    LAST_WEIGHT_NORM = "last_weight_norm"
    SPECTRAL_NORM = "spectral_norm"  # of the first weight
    PARAMETRIZED = "parametrized"  # the last weight


@dataclass(frozen=True, slots=True)
class IdiomsSpec:
    """What one model is made of. `groups` × `size` is the width between the weights, `outer` that around; `lines` are names of `LINES`.

    Raises:
        InputError: no such line, sizes below 1.
    """

    groups: int = 2
    size: int = 4
    outer: int = 8
    up: Up = Up.LINEAR
    weights: Weights = Weights.MODULES
    lines: tuple[str, ...] = ("tanh",)
    call: Call = Call.PLAIN
    repeat: Repeat = Repeat.ONE
    differ: Differ = Differ.NOT
    around: frozenset[Around] = frozenset()

    def __post_init__(self) -> None:
        problems = [f"{n} is {getattr(self, n)!r}, wanted at least 1" for n in ("groups", "size", "outer") if getattr(self, n) < 1]
        problems += [f"no line is called {name!r}" for name in self.lines if name not in LINES]
        if problems:
            raise InputError("Idioms: " + "; ".join(problems))

    @property
    def width(self) -> int:
        """Entries between the weights."""
        return self.groups * self.size
