"""Finds attributes that look as if they had to become local. Where no trace tells, a recipe has to name every one of them.

A module's forward may compute with an int that has the value of a sharded size (a number of heads, a width). Without a trace nobody
knows whether it does. So the recipe has to give the attribute's layout, or `whole`.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Iterator
from types import CodeType, FunctionType

from torch import nn

from autotp.plan.names import folded
from autotp.recipe.binding import Bound
from autotp.recipe.check import cut_sizes, own_params
from autotp.recipe.problems import Problem, Problems
from autotp.recipe.spec import Role


def unnamed(bound: Bound) -> Iterator[tuple[str, str, int]]:
    """Yields (module path, attribute path, value) of every such attribute that the recipe does not name."""
    named = {(a.module, a.local.path) for a in bound.attributes}
    sizes: dict[str, set[int]] = {}
    for path, params in own_params(bound).items():
        parts = [p for p in params if p.role not in (Role.LOOKUP, Role.GATHERED)]  # what these cut is whole again behind them
        found = {n for p in parts for d in p.layout.dims for n in cut_sizes(d, bound.tp)}
        for near in {path, path.rpartition(".")[0]}:
            sizes.setdefault(near, set()).update(found)
    counters = _counters(bound.model, sizes)
    for path, wanted in sizes.items():
        module = bound.model.get_submodule(path)
        if isinstance(module, nn.Linear | nn.Embedding):
            continue  # their rewritten forms read shapes only
        read = {chain for code in _codes(type(module)) for chain in _chains(code)}
        for name, value in _ints(module):
            if name in read and value in wanted and (path, name) not in named and (folded(path), name) not in counters:
                yield path, name, value


def _counters(model: nn.Module, paths: Iterable[str]) -> set[tuple[str, str]]:
    """(path with numbers as `*`, attribute) of what numbers the blocks: in every block it is the number of the block."""
    found: dict[tuple[str, str], list[bool]] = {}
    for path in paths:
        numbers = [part for part in path.split(".") if part.isdigit()]
        for name, value in _ints(model.get_submodule(path)) if numbers else ():
            found.setdefault((folded(path), name), []).append(str(value) == numbers[-1])
    return {key for key, same in found.items() if len(same) > 1 and all(same)}


def unnamed_attributes(bound: Bound) -> list[Problem]:
    """Makes a problem for each of them."""
    problems = Problems()
    for path, name, value in unnamed(bound):
        kind = type(bound.model.get_submodule(path)).__name__
        text = (
            f"{value} is also the size of something that is cut, and the code of {kind} reads it: "
            "name it under attributes:, with its layout if it must become local, else as `whole`"
        )
        problems.add(bound.recipe.place, f"{path + '.' if path else ''}{name}", text)
    return list(problems)


def _ints(module: nn.Module) -> Iterator[tuple[str, int]]:
    """Int attributes of a module, and of plain objects (a config) among its attributes."""
    for name, value in vars(module).items():
        if type(value) is int:
            yield name, value
        elif hasattr(value, "__dict__") and not callable(value) and not name.startswith("_"):
            yield from ((f"{name}.{field}", number) for field, number in vars(value).items() if type(number) is int)


def _codes(cls: type) -> Iterator[CodeType]:
    """Code of the methods of a module's class that run in a call."""
    for base in cls.__mro__[: cls.__mro__.index(nn.Module)]:
        for name, method in vars(base).items():
            method = inspect.unwrap(method) if callable(method) else method
            if isinstance(method, FunctionType) and (name == "forward" or (not name.startswith("_init") and not name.startswith("__"))):
                yield method.__code__


def _chains(code: CodeType) -> Iterator[str]:
    """Yields the attribute chains that a method reads of its first argument: `num_heads`, `config`, `config.num_heads`."""
    own = code.co_varnames[:1]
    chain: list[str] | None = None
    for step in dis.get_instructions(code):
        if step.opname.startswith("LOAD_FAST") and own and step.argval in (own[0], own):
            chain = []
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD") and chain is not None:
            chain.append(step.argval)
            yield ".".join(chain)
        elif step.opname != "CACHE":
            chain = None
