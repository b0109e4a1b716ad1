"""A parallel model carries its plan and its group: this module stores and finds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.adapters import base_of
from autotp.errors import InputError, PlanError
from autotp.examine import Check
from autotp.plan.placements import AS_PLANNED, Placements
from autotp.plan.plan import Plan
from autotp.plan.spec import ParamPlan
from autotp.planning import RecipeLike
from autotp.preflight import STATE as _STATE
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.undo import Undo
from autotp.trace.example import Given


@dataclass(frozen=True, slots=True)
class Request:
    """What the caller asked of the plan; see `autotp.parallelize`."""

    recipe: RecipeLike | None = None
    example_inputs: Given | None = None
    strict: bool = False
    check: Check = Check.NUMBERS
    placements: Placements = AS_PLANNED


@dataclass(frozen=True, slots=True)
class ParallelState:
    """A parallel model carries this: its plan and its group.

    mesh, request: what it was made with; None on one rank. journal: takes the rewrite back, but for the parameters; None in a copy,
    whose modules it does not know.
    """

    plan: Plan
    comm: Comm
    mesh: DeviceMesh | None = None
    request: Request = Request()
    journal: Undo | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> ParallelState:
        return replace(self, journal=None)


def prefix_of(model: nn.Module) -> str:
    """What stands before the plan's names in the names of `model`: "" unless PEFT wraps the parallel model."""
    base = base_of(model)
    return next((f"{path}." for path, m in model.named_modules() if m is base and path), "")


def params_of(model: nn.Module) -> Mapping[str, ParamPlan]:
    """The plans of the parameters of a parallel model by the names that they have in `model`, which may be a wrapper of PEFT.

    Raises:
        InputError, PlanError: as `state_of`.
    """
    params, prefix = state_of(model).plan.params, prefix_of(model)
    return {prefix + name: p for name, p in params.items()} if prefix else params


def state_of(model: object) -> ParallelState:
    """Returns the plan and the group of a parallel model, or of the parallel model in a wrapper of PEFT.

    Raises:
        InputError: `model` is no module. PlanError: it is not parallel.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"expected an nn.Module, got {type(model).__name__}")
    state = base_of(model).__dict__.get(_STATE)
    if not isinstance(state, ParallelState):
        raise PlanError(f"{type(model).__name__} is not parallel: call autotp.parallelize(model, mesh) first")
    return state
