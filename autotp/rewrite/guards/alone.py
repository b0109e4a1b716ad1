"""Refuses to call a module by itself if it takes or returns a rank's part at its boundary with other modules.

A result with a name is made whole instead: the pooled states of an encoder, say, that the model itself does not read. So are gradients
that are summands of the ranks at the boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autotp.errors import AutoTPError
from autotp.plan.conversions import Op
from autotp.plan.items import slot_of
from autotp.plan.plan import Plan
from autotp.plan.spec import Boundary, GradSum, Shown
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import bind, copy, taken_once
from autotp.rewrite.modules.classes import STATE, check_calls, wrap_forward
from autotp.rewrite.modules.linear import LinearRun
from autotp.rewrite.running import Running
from autotp.rewrite.undo import Undo
from autotp.trace.boundary import flatten_arguments, flatten_result

_in_backward = torch._C._current_graph_task_id
_PARTS = "_autotp_parts"


class Alone:
    """Refuses calls of one module by itself, with `text`. `running`: whether a call of the model is open."""

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


class Parts:
    """Knows the rank's parts in the arguments and results of a module, for calls of it by itself.

    A result that has a name (in a dict, an output of transformers) may be absent: attention weights that nobody asked for. Where the
    gradient of a whole value is a summand of each rank in a call of the model, that of an argument is summed, and that of a result
    counts on one rank: code around the module has it whole.
    """

    __slots__ = ("comm", "counted", "made", "named", "summed", "text", "where")

    def __init__(self, path: str, module: nn.Module, slots: tuple[Boundary, ...], comm: Comm) -> None:
        self.where = f"{path} ({type(module).__qualname__})"
        found = _parts(slots)
        self.named = {b.path: b for b in found if b.result and b.path and isinstance(b.path[0], str)}
        always = next((b for b in found if b.path not in self.named or not b.result), None)
        self.text = "" if always is None else _text(self.where, always)
        self.made = {b.path: bind(b.whole, comm) for b in self.named.values() if b.whole is not None}
        self.comm = comm
        self.summed = frozenset(b.path for b in slots if not b.result and b.shown is Shown.GRADIENT)
        self.counted = frozenset(b.path for b in slots if b.result and b.shown is Shown.GRADIENT)

    def check(self) -> None:
        """Runs before a call.

        Raises:
            AutoTPError: every call of the module takes or returns a part.
        """
        if self.text and _in_backward() == -1:
            raise AutoTPError(self.text)

    def arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments of a call, of which gradients are summed where they are summands."""
        return flatten_arguments(module, args, kwargs, self._summed) if self.summed and _in_backward() == -1 else (args, kwargs)

    def _summed(self, path: tuple[str | int, ...], tensor: Tensor) -> Tensor:
        return copy(tensor, self.comm) if slot_of(path, self.summed) is not None else tensor

    def whole(self, result: Any) -> Any:
        """Returns the result of a call, made whole.

        Raises:
            AutoTPError: a part is in the result that is not made whole, or the result has no names to tell.
        """
        return flatten_result(result, self._whole) if (self.named or self.counted) and _in_backward() == -1 else result

    def _whole(self, path: tuple[str | int, ...], tensor: Tensor) -> Tensor:
        if slot_of(path, self.counted) is not None:
            return taken_once(tensor, self.comm)
        if not self.named:
            return tensor
        slot = slot_of(path, self.named)
        found = None if slot is None else self.named[slot]
        if found is None and not (path and isinstance(path[0], str)):
            found = next(iter(self.named.values()))
        if found is None:
            return tensor
        if slot in self.made:
            return self.made[slot](tensor)
        raise AutoTPError(_text(self.where, found))


def _parts(slots: tuple[Boundary, ...]) -> list[Boundary]:
    return [b for b in slots if b.shown in (Shown.PART, Shown.SUM)]


def _text(where: str, found: Boundary) -> str:
    what = "a rank's part" if found.shown is Shown.PART else "a summand of each rank"
    return (
        f"{where} is called outside of a call of the model: its {found} is {what} there. Call a module "
        "around it whose arguments and results are whole, or compute with autotp.full_state_dict(model)"
    )


def _around(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs a leaf whose gradients are summands at its boundary in calls of the model."""
    parts: Parts = module.__dict__[_PARTS]
    if parts.comm.running.open or not torch.is_grad_enabled():
        return forward(module, *args, **kwargs)
    args, kwargs = parts.arguments(module, args, kwargs)
    return parts.whole(forward(module, *args, **kwargs))


def install_alone(model: nn.Module, plan: Plan, comm: Comm, undo: Undo) -> None:
    """Guard the modules without children that hold parts at their boundaries; those with children are entries."""
    running = comm.running
    summed = {
        m.path
        for m in plan.modules
        if any(u.grad is GradSum.ALL for u in m.uses) or any(c.op is Op.COPY for slot in m.outputs for c in slot.conversions)
    }
    for path, slots in plan.boundaries.items():
        module = model.get_submodule(path)
        found = _parts(slots)
        if module._modules:
            continue
        if not found:
            if path in summed and any(b.result and b.shown is Shown.GRADIENT for b in slots):
                undo.set_item(module.__dict__, _PARTS, Parts(path, module, slots, comm))
                wrap_forward(module, _around, undo)
            continue
        guard = Alone(running, _text(f"{path} ({type(module).__qualname__})", found[0]))
        run = module.__dict__.get(STATE)
        if isinstance(run, LinearRun):
            run.alone = guard  # goes with the run
            continue
        check_calls(module, "_autotp_alone", guard, undo, compiled=True)
