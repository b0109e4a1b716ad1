"""Tells which values are watched by `==`: plain ones, and what has no parts of its own to be watched.

A value of any kind counts as plain that is no container and holds no attributes: a slice, a dtype, a device, a date, a pattern, a
method of torch's. What is made outside of Python has an `==` of any kind, so values are asked only where they are other objects than
before, and one that fails says that they differ.
"""

from __future__ import annotations

from array import array
from collections import deque
from enum import Enum
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

MOST = 1024  # items of a list or dict
_CONTAINERS = (list, tuple, set, frozenset, dict, deque, numpy.ndarray, Tensor)
#: What the numbers of a call come from or run on, and no path of code depends on.
_HANDLES = (torch.Generator, torch.Stream, torch.Event)


def is_plain(value: Any, floats: bool = False) -> bool:
    """True for a value that is watched by `==`. `floats`: they are, too."""
    kind = type(value)
    if kind in (tuple, list, set, frozenset):
        return len(value) < MOST and all(is_plain(v, True) for v in value)
    if isinstance(value, dict):
        return len(value) < MOST and all(is_plain(k, True) and is_plain(v, True) for k, v in value.items())
    if kind in (bytearray, array):
        return len(value) < MOST
    if isinstance(value, partial):
        return is_plain(value.func)
    if isinstance(value, float | numpy.floating) and not isinstance(value, Enum):
        return floats
    return isinstance(value, (Enum, numpy.generic, type, FunctionType)) or is_method_of_module(value) or _has_no_parts(value)


def is_method_of_module(value: Any) -> bool:
    """True for a method of a module: what that module holds is watched there."""
    return isinstance(value, MethodType) and isinstance(value.__self__, nn.Module)


def has_slots(kind: type) -> bool:
    """True for a class in Python whose objects have slots for what they hold."""
    return hasattr(kind, "__slots__") and kind.__module__ != "builtins" and not kind.__module__.startswith("torch")


def _has_no_parts(value: Any) -> bool:
    if isinstance(value, (*_CONTAINERS, *_HANDLES, MethodType)) or type(value).__module__.startswith("torch._C._distributed"):
        return False
    return not hasattr(value, "__dict__") and not has_slots(type(value))


def is_equal(now: Any, before: Any) -> bool:
    """True for the same object, and for an equal one."""
    if now is before:
        return True
    try:
        return bool(now == before)
    except Exception:  # an `==` of another library: of arrays, of objects that want their like
        return False
