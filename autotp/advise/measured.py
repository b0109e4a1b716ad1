"""What one rank does and holds, as values: measured on fake tensors, for no hardware in particular."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from autotp.advise.comm import Message
from autotp.advise.operators import Work
from autotp.plan.conversions import CollectiveKind


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward, a backward or a decode step of one rank: its operator calls and its collectives, alike ones counted."""

    work: Mapping[Work, int] = field(default_factory=dict)
    messages: Mapping[Message, int] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Floating-point operations."""
        return sum(w.flops * n for w, n in self.work.items())

    @property
    def bytes(self) -> int:
        """Bytes that operators read and write."""
        return sum(w.bytes * n for w, n in self.work.items())

    @property
    def operators(self) -> int:
        """Operator calls, views included: the host makes each of them."""
        return sum(self.work.values())

    @property
    def collectives(self) -> int:
        """Number of collectives."""
        return sum(self.messages.values())

    @property
    def message_bytes(self) -> int:
        """Bytes of the results of all collectives."""
        return sum(m.bytes * n for m, n in self.messages.items())

    @property
    def largest_gather(self) -> int:
        """Bytes of the largest result of an all-gather."""
        return max((m.bytes for m in self.messages if m.kind is CollectiveKind.ALL_GATHER), default=0)

    def __add__(self, other: Pass) -> Pass:
        return Pass(Counter(self.work) + Counter(other.work), Counter(self.messages) + Counter(other.messages))


@dataclass(frozen=True, slots=True)
class Weights:
    """Bytes of one rank's weights.

    parameters: all parts of parameters. trained: of those that have gradients. buffers: what is no parameter. units: bytes of the
    parameters of each unit that FSDP gathers.
    """

    parameters: int
    trained: int
    buffers: int
    units: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Served:
    """Requests of one replica. cache: bytes kept between steps at the end. temporary: the most that is alive besides it."""

    weights: Weights
    prefill: Pass
    decode: Pass
    cache: int
    temporary: int


@dataclass(frozen=True, slots=True)
class Trained:
    """One forward and backward of one replica.

    activations: bytes saved for the backward, when the forward has ended. temporary: the most that is alive besides them, gradients
    of parameters left out.
    """

    weights: Weights
    forward: Pass
    backward: Pass
    activations: int
    temporary: int
