"""Functions of torch that are code like a model's: many operators, with ints that the code computes between them.

To a `TorchFunctionMode` a function of `torch.nn.functional` is one call, and what it calls is not shown. These are *opened*: the
recorder, and the rewrite at run time, run their code as if the model had written it, so that each call in it has a place of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

#: The functions that are opened.
_OPENED: frozenset[Callable[..., Any]] = frozenset((F.multi_head_attention_forward,))
#: Names of functions in the file of `torch.nn.functional` whose frames are places of calls: those above, and what they call there.
OPEN_NAMES = frozenset(("multi_head_attention_forward", "_in_projection_packed"))
FILE = F.__file__


def opened(function: Any) -> Callable[..., Any] | None:
    """Returns the code of `function` as a function that does not hand itself to a mode; None where it stays one call.

    The code object is the same, so that places in it are the same with and without a mode. It sees the names of its file as they are
    now: other libraries may have replaced some.
    """
    if not isinstance(function, FunctionType) or function not in _OPENED:
        return None
    names = {**function.__globals__, "has_torch_function": _no, "_in_projection": _in_projection}
    made = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


def runs_opened(cls: type[nn.Module]) -> bool:
    """True for a class whose forward calls an opened function: its masks and flags decide what runs, as those of a model's own code."""
    code = getattr(cls.forward, "__code__", None)
    return code is not None and not OPEN_NAMES.isdisjoint(code.co_names)


def _in_projection(
    q: Tensor, k: Tensor, v: Tensor, w_q: Tensor, w_k: Tensor, w_v: Tensor, b_q: Tensor | None, b_k: Tensor | None, b_v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Does what torch's function of this name does, which first compares the weights' shapes with those of one device."""
    return F.linear(q, w_q, b_q), F.linear(k, w_k, b_k), F.linear(v, w_v, b_v)


def _no(tensors: tuple[Any, ...]) -> bool:
    """The answer to the question whether the function must be handed to a mode: it has been."""
    return False
