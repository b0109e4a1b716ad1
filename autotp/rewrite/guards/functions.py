"""Finds what a function keeps for its calls: variables of its closure, and defaults of its arguments."""

from __future__ import annotations

import dis
import os
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch

from autotp.trace.reading import IGNORED, NEAR, tests

_MOST = 64  # functions in a list
_DEEPEST = 4  # functions in closures of functions (decorators)
#: Folders of code that nobody changes between two calls: torch's, and what wraps the model's own code here.
_OTHERS = tuple(str(folder) + os.sep for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))


def kept_by(function: Any, depth: int = 0) -> Iterator[tuple[str, Any, str, bool]]:
    """Yields (what it is called, its holder, the holder's attribute, whether a condition is about it) of each value.

    Those of functions in a closure too, and of functions in lists and dicts.
    """
    if isinstance(function, (list, tuple, dict)) and len(function) <= _MOST and depth < _DEEPEST:
        for item in function.values() if isinstance(function, dict) else function:
            yield from kept_by(item, depth + 1)
        return
    function = function.fget if isinstance(function, property) else function
    function = function.func if isinstance(function, partial) else function
    function = function.__func__ if isinstance(function, MethodType | staticmethod | classmethod) else function
    if not isinstance(function, FunctionType) or depth == _DEEPEST:
        return
    name = function.__qualname__.rpartition("<locals>.")[2]
    own = function.__code__.co_filename.startswith(_OTHERS)
    for holder in ("__defaults__", "__kwdefaults__"):
        if getattr(function, holder) and not own:
            yield f"a default of {name}", function, holder, False
    tested = frozenset() if own or not function.__closure__ else _tested(function.__code__)
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        held = _contents(cell)
        if isinstance(held, FunctionType | partial | MethodType | list | tuple | dict):
            yield from kept_by(held, depth + 1)
        if variable != "__class__" and held is not cell and not own:
            yield f"{variable}, a variable around {name}", cell, "cell_contents", variable in tested


@lru_cache(maxsize=1024)  # blocks share the functions of their class
def _tested(code: CodeType) -> frozenset[str]:
    """The variables around a function that one of its conditions is about."""
    found = [i for i in dis.get_instructions(code) if i.opname not in IGNORED]
    after = [(i.argval, found[at + 1 : at + 1 + NEAR]) for at, i in enumerate(found) if i.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF")]
    return frozenset(name for name, rest in after if any(tests(j) for j in rest))


def _contents(cell: CellType) -> Any:
    """What is in a cell; the cell itself where it is empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return cell
