"""Tells which module's own code runs, and what the plan says that this code holds.

It reads the stack of Python, which is slow. Nothing that the plan knows of asks: only a module that no traced call ran, and an
operator that gets a parameter itself in place of a rank's local tensor.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import CodeType, FrameType

from torch import nn

from autotp.plan.spec import Shown

#: In the `__dict__` of each module that a traced call ran.
HOLDING = "_autotp_holding"
_CALL = nn.Module._call_impl.__code__
_INSIDE = tuple(c for c in _CALL.co_consts if isinstance(c, CodeType))  # where a module has hooks
_WORDS = {
    Shown.SUM: "summands of the ranks",
    Shown.PART: "a rank's part",
    Shown.GRADIENT: "whole values whose gradients are summands of the ranks",
}
EXAMPLES = "Pass example_inputs of such a call to parallelize as well (a list of several calls)"


@dataclass(frozen=True, slots=True)
class Holding:
    """What the own code of the module at `path` holds; shown None: whole values alone."""

    path: str
    shown: Shown | None

    def __str__(self) -> str:
        held = "" if self.shown is None else f", which holds {_WORDS[self.shown]}"
        return f"the code of {self.path or 'the model'}{held}"

    def __deepcopy__(self, memo: object) -> Holding:
        return self


def running_code() -> tuple[Holding, nn.Module] | None:
    """Returns what the code of the innermost module that runs holds, and the outermost module of the call; None where there is none.

    A module that no traced call ran, or that came after `parallelize`, runs as a part of the code that calls it. In a hook of a module
    no code of the model runs.
    """
    found: Holding | None = None
    root: nn.Module | None = None
    frame: FrameType | None = sys._getframe(1)
    below: CodeType | None = None
    while frame is not None:
        code = frame.f_code
        if code is _CALL:
            module = frame.f_locals["self"]
            holding = module.__dict__.get(HOLDING)
            if holding is not None:
                if found is None and not _is_forward(module, below):
                    return None
                found, root = found or holding, module
        if code not in _INSIDE:
            below = code
        frame = frame.f_back
    return None if found is None or root is None else (found, root)


def _is_forward(module: nn.Module, called: CodeType | None) -> bool:
    forward = getattr(module.forward, "__func__", module.forward)
    return getattr(forward, "__code__", called) is called
