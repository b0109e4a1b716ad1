"""A module between whose boundaries and the others a value is a rank's part gives a part, or wants one: it is not called by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from autotp.errors import AutoTPError
from autotp.plan.model import Boundary, Shown
from autotp.plan.plan import Plan
from autotp.rewrite.classes import STATE, check_calls
from autotp.rewrite.hooks import Running
from autotp.rewrite.linear import LinearRun
from autotp.rewrite.undo import Undo

_in_backward = torch._C._current_graph_task_id


class Alone:
    """What one module says when it is called by itself. `running`: whether a call of the model is open."""

    __slots__ = ("running", "text")

    def __init__(self, running: Running, text: str) -> None:
        self.running, self.text = running, text

    def check(self, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> None:
        """Raise outside of a call of the model, and of the backward that runs a part of one again.

        Raises:
            AutoTPError: names the module.
        """
        if not self.running.open and _in_backward() == -1:
            raise AutoTPError(self.text)


def reason(path: str, module: nn.Module, slots: tuple[Boundary, ...]) -> str:
    """Why a module cannot be called by itself; "" where it can."""
    found = next((b for b in slots if b.shown in (Shown.PART, Shown.SUM)), None)
    if found is None:
        return ""
    what = "a rank's part" if found.shown is Shown.PART else "a summand of each rank"
    return (
        f"{path} ({type(module).__qualname__}) is called outside of a call of the model: its {found} is {what} there. Call a module "
        "around it whose arguments and results are whole, or compute with autotp.full_state_dict(model)"
    )


def install_alone(model: nn.Module, plan: Plan, running: Running, undo: Undo) -> None:
    """Guard the modules without children that hold parts at their boundaries; those with children are entries."""
    for path, slots in plan.boundaries.items():
        module = model.get_submodule(path)
        text = reason(path, module, slots)
        if not text or module._modules:
            continue
        run = module.__dict__.get(STATE)
        if isinstance(run, LinearRun):
            run.alone = Alone(running, text)  # goes with the run
            continue
        check_calls(module, "_autotp_alone", Alone(running, text), undo, own=False)
