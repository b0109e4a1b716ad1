"""Gives the parallel parameter to every holder of the old one besides its module.

A parameter cannot become a DTensor in place (the classes' instances are laid out differently in memory), so a new object takes its
place. Lists, dicts, closures, attributes and optimizers made before `parallelize` may hold the old one, and would go on computing
with a whole tensor that nothing trains. The garbage collector finds these holders, and they get the new one. The search covers only
parameters with more references than their modules account for. A holder that cannot be found or changed (a local variable, a C++
object) keeps the old object, which from then on raises at every use.
"""

from __future__ import annotations

import functools
import gc
import sys
from collections.abc import Iterable, Mapping
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from autotp.errors import AutoTPError, PlanError
from autotp.rewrite.undo import Undo

_FIXED = (tuple, frozenset)


class Pair:
    """A parameter and the one that replaces it. `names`: those that it has in the model."""

    __slots__ = ("names", "new", "old")

    def __init__(self, names: tuple[str, ...], old: Any, new: Any) -> None:
        self.names, self.old, self.new = names, old, new


class Replaced(nn.Parameter):
    """A parameter as it was before `parallelize`, whose holder could not be given the new one. Every use of it raises."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        held: Any = next((a for a in args if isinstance(a, Replaced)), None)
        name = "a parameter" if held is None else f"the parameter {vars(held)['_name']!r}"
        raise AutoTPError(
            f"{name} was taken from the model before parallelize, which replaced it: take it from the model again "
            "(model.get_parameter), or make what holds it after parallelize"
        )

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<{vars(self).get('_name')}, replaced by autotp.parallelize>"


def now(x: Any) -> Any:
    """Returns the replacement of `x`, where there is one."""
    return vars(x)["_now"] if type(x) is Replaced else x


def give_new(pairs: Iterable[Pair], tables: Mapping[int, Any], ignored: Iterable[object], undo: Undo) -> None:
    """Replace the old parameters of `pairs` by the new ones wherever they are held, journalled.

    Args:
        tables: `id → _parameters` of the model's modules, which are left alone, as are the containers in `ignored`. Each old parameter
            must be in one of `tables` and one of `ignored` for each of its names.

    Raises:
        PlanError: a module outside of the model has one of the parameters too.
    """
    by_old = {id(pair.old): pair for pair in pairs}
    # one reference from the pair, one from the call itself
    held = [pair.old for pair in by_old.values() if sys.getrefcount(pair.old) > 2 + 2 * len(pair.names)]
    _give_everywhere(held, by_old, {*tables, *map(id, ignored)}, undo)


def _give_everywhere(held: list[Any], by_old: Mapping[int, Pair], skip: set[int], undo: Undo) -> None:
    # Each search walks over every object of the process, so it is one for all. No closure here: its cell would be found as a holder.
    if not held:
        return
    holders = [x for x in gc.get_referrers(*held) if id(x) not in skip and x is not held and not isinstance(x, Pair)]
    skip = {*skip, id(held), id(holders)}
    tables: list[Any] = [x for x in holders if isinstance(x, dict)]
    if _foreign(tables) is not None:
        gc.collect()  # what nobody refers to any more does not count
        if (table := _foreign(tables)) is not None:
            raise PlanError(
                f"{_first_name(table, by_old)} is also a parameter of a module outside of the model: parallelize a module that holds "
                "both, or give them parameters of their own"
            )
    fixed: list[Any] = [x for x in holders if isinstance(x, _FIXED)]  # what holds one of these is given another one
    changed = {id(x): Pair((), x, _remade(x, by_old)) for x in fixed}
    _give_everywhere(fixed, {**by_old, **changed}, {*skip, id(tables)}, undo)
    for holder in holders:
        if not isinstance(holder, _FIXED) and _give(holder, by_old):
            undo.push(functools.partial(_give_back, holder, _backwards(by_old)))


def _remade(x: Any, by_old: Mapping[int, Pair]) -> Any:
    """A tuple or frozenset as it is with the new parameters."""
    kind = tuple if isinstance(x, tuple) else frozenset
    return kind.__new__(type(x), (_new(v, by_old) for v in x))


def _new(x: Any, by_old: Mapping[int, Pair]) -> Any:
    return by_old[id(x)].new if id(x) in by_old else x


def _first_name(table: Mapping[str, Any], by_old: Mapping[int, Pair]) -> str:
    return next(by_old[id(v)].names[0] for v in table.values() if id(v) in by_old)


def _give_back(holder: Any, by_new: Mapping[int, Pair]) -> None:
    _give(holder, by_new)


def _backwards(by_old: Mapping[int, Pair]) -> dict[int, Pair]:
    return {id(p.new): Pair(p.names, p.new, p.old) for p in by_old.values()}


def _foreign(tables: list[Any]) -> Any:
    """The first of `tables` that is a module's table of parameters."""
    if not tables:
        return None
    ids = {id(table) for table in tables}
    for owner in gc.get_referrers(*tables):
        attributes = owner if isinstance(owner, dict) else vars(owner) if isinstance(owner, nn.Module) else {}
        table = attributes.get("_parameters")
        if id(table) in ids and "_modules" in attributes:
            return table
    return None


def _give(holder: Any, by_old: Mapping[int, Pair]) -> bool:
    """Replace in one container; False where it holds none in a way that can be changed."""
    if isinstance(holder, dict):
        return _give_dict(holder, by_old)
    if isinstance(holder, list):
        found = [i for i, v in enumerate(holder) if id(v) in by_old]
        for i in found:
            holder[i] = by_old[id(holder[i])].new
        return bool(found)
    if isinstance(holder, set):
        members = [v for v in holder if id(v) in by_old]
        for v in members:
            holder.discard(v)
            holder.add(by_old[id(v)].new)
        return bool(members)
    if isinstance(holder, CellType):
        if id(holder.cell_contents) not in by_old:
            return False
        holder.cell_contents = by_old[id(holder.cell_contents)].new
        return True
    if isinstance(holder, functools.partial):
        if id(holder.args) not in by_old:
            return False
        holder.__setstate__((holder.func, by_old[id(holder.args)].new, holder.keywords, vars(holder)))  # type: ignore[attr-defined]
        return True
    if isinstance(holder, FunctionType) and id(holder.__defaults__) in by_old:
        holder.__defaults__ = by_old[id(holder.__defaults__)].new
        return True
    if isinstance(holder, Tensor | type) or not hasattr(holder, "__dict__"):
        return _give_slots(holder, by_old)
    return _give_dict(vars(holder), by_old) or _give_slots(holder, by_old)


def _give_dict(holder: dict[Any, Any], by_old: Mapping[int, Pair]) -> bool:
    if any(id(k) in by_old for k in holder):
        items = [(by_old[id(k)].new if id(k) in by_old else k, v) for k, v in holder.items()]
        holder.clear()
        holder.update(items)
        _give_dict(holder, by_old)
        return True
    found = [k for k, v in holder.items() if id(v) in by_old]
    for k in found:
        holder[k] = by_old[id(holder[k])].new
    return bool(found)


def _give_slots(holder: Any, by_old: Mapping[int, Pair]) -> bool:
    done = False
    for cls in type(holder).__mro__:
        names = vars(cls).get("__slots__", ())
        for name in (names,) if isinstance(names, str) else names:
            slot: Any = vars(cls).get(name)
            value = getattr(holder, name, None)
            if id(value) in by_old and hasattr(slot, "__set__"):
                slot.__set__(holder, by_old[id(value)].new)
                done = True
    return done


def _refuse_gradient(name: str, _: Tensor) -> None:
    raise AutoTPError(
        f"the parameter {name!r} was used before it was replaced (by parallelize, or by the first call after adapters were put on the "
        "model): its gradient would be lost. Compute with it afterwards, taken from the model again"
    )


@torch.no_grad()
def retire(pairs: Iterable[Pair]) -> None:
    """Free the old parameters' memory; those that someone still holds raise from now on."""
    for pair in pairs:
        old, pair.old = pair.old, None
        if sys.getrefcount(old) > 2 and type(old) is nn.Parameter:
            old.grad = None
            if old.requires_grad:  # a graph of it may be there already, whose gradient would be lost
                old._backward_hooks = None  # the new one has these
                old.register_hook(functools.partial(_refuse_gradient, pair.names[0]))  # type: ignore[no-untyped-call]
            old.data = old.new_zeros(()).expand(old.shape)
            vars(old).update(_name=pair.names[0], _now=pair.new)
            old.__class__ = Replaced
