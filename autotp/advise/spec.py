"""The fields of advice, as a value."""

from __future__ import annotations

from dataclasses import dataclass

from autotp.advise.machine import Machine
from autotp.advise.option import Option
from autotp.advise.workload import Workload


@dataclass(frozen=True, slots=True)
class AdviceSpec:
    """The fields of an `Advice`: how to place a model on GPUs.

    model: its class. elements: of its parameters, tied ones once. unit: of `Option.throughput`. sentence: which option to take and
    why. best: that option, None where none fits.
    """

    model: str
    elements: int
    workload: Workload
    machine: Machine
    options: tuple[Option, ...]
    best: Option | None
    sentence: str
    notes: tuple[str, ...]
    unit: str
