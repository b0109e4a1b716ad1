"""One way to place a model on GPUs: the memory of each, and the time of its work. Values, and their sums."""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum


class Kind(Enum):
    """What the GPUs beyond one tp group do."""

    REPLICAS = "replicas"  # each group has a whole model
    FSDP = "fsdp"  # each group has a share of everything, and gathers a unit at a time
    PIPELINE = "pipeline"  # each has consecutive blocks


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each GPU.

    weights: parameters and buffers. activations: saved for the backward. temporary: the most that operators need besides. cache:
    keys and values, or a state. communication: what collectives write into, and the buffers of their library.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    temporary: int = 0
    cache: int = 0
    communication: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, slots=True)
class Step:
    """One kind of step, on each GPU: a prefill, a decoded token, a training step.

    flops, bytes: of operators. operators: calls, views included. collectives, message_bytes: tensor-parallel ones, and the bytes of
    their results. compute, communication: seconds; of the communication that nothing hides. seconds: of all, the optimizer's step included.
    """

    name: str
    flops: int
    bytes: int
    operators: int
    collectives: int
    message_bytes: int
    compute: float
    communication: float

    @property
    def seconds(self) -> float:
        """Compute and communication."""
        return self.compute + self.communication


@dataclass(frozen=True, slots=True)
class Option:
    """One way to place the model.

    tp: GPUs that compute one model together. groups: how many such groups, of `kind`. batch: sequences (or requests) of each group at
    a time, and `passes` of them a step. largest_batch: the most that fits; None where sizes are the caller's. throughput: tokens a
    second of all groups (calls a second where sizes are the caller's). share: of communication in the time.
    """

    tp: int
    groups: int
    kind: Kind
    memory: Memory
    fits: bool
    batch: int
    passes: int
    largest_batch: int | None
    steps: tuple[Step, ...]
    throughput: float
    share: float

    @property
    def seconds(self) -> float:
        """Seconds of the last step: a decoded token, a training step, a call."""
        return self.steps[-1].seconds

    def __str__(self) -> str:
        """`tp=4 × 2 replicas`."""
        if self.kind is Kind.PIPELINE:
            return f"pipeline of {self.groups}"
        what = {Kind.REPLICAS: "replicas" if self.groups > 1 else "replica", Kind.FSDP: "FSDP"}[self.kind]
        return f"tp={self.tp}" if self.groups == 1 else f"tp={self.tp} × {self.groups} {what}"
