"""A parallel model carries its plan and its group: this module stores and finds them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from autotp.errors import InputError, PlanError
from autotp.plan.plan import Plan
from autotp.preflight import STATE as _STATE
from autotp.rewrite.collectives.comm import Comm


@dataclass(frozen=True, slots=True)
class ParallelState:
    """A parallel model carries this: its plan and its group."""

    plan: Plan
    comm: Comm

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelState:
        return self


def state_of(model: object) -> ParallelState:
    """Returns the plan and the group of a parallel model.

    Raises:
        InputError: `model` is no module. PlanError: it is not parallel.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, got {type(model).__name__}")
    state = model.__dict__.get(_STATE)
    if not isinstance(state, ParallelState):
        raise PlanError(f"{type(model).__name__} is not parallel: call autotp.parallelize(model, mesh) first")
    return state
