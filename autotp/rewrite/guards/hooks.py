"""Guards the hooks that users put on modules of a parallel model.

Between regions a hook gets the values that it would get on one device. Inside of one (`Plan.boundaries`) it would get a rank's
part, a summand, or a gradient that is a summand, and would compute other numbers. Such a hook is refused when it is registered, at
no cost to any call. Three kinds are accepted: hooks that the model's own code registers while it runs (the trace has seen them),
those of torch's own tools, and an `Observer`, which declares that it expects such values.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.modules.module as torch_module
from torch import nn

from autotp.errors import AutoTPError
from autotp.plan.plan import Plan
from autotp.plan.spec import Boundary, Shown
from autotp.rewrite.guards.own_grad import Copied, Hook, Summed, is_torchs
from autotp.rewrite.observer import Observer
from autotp.rewrite.running import Running
from autotp.rewrite.undo import Undo

_FORWARD, _FORWARD_PRE, _BACKWARD, _BACKWARD_PRE = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_WORDS = {_FORWARD: "forward hook", _FORWARD_PRE: "forward pre-hook", _BACKWARD: "backward hook", _BACKWARD_PRE: "backward pre-hook"}
_GLOBAL = {table: f"_global{table}" for table in _WORDS}
_SAYS = {
    Shown.PART: "this rank's part",
    Shown.SUM: "this rank's summand",
    Shown.HELD: "summed together with the result of another module",
    Shown.GRADIENT: "whole, with a gradient that is this rank's summand",
    Shown.UNKNOWN: "not known to be whole",
}


class InnerHooks(OrderedDict[int, Any]):
    """One table of hooks of a module inside of a region: it refuses hooks that would get other than whole values."""

    def __init__(self, refusal: str, running: Running) -> None:
        super().__init__()
        self.refusal, self.running = refusal, running

    def let_go(self) -> None:
        """Accept any hook from now on: the model is parallel no more."""
        self.running = Running()
        self.running.open = True

    def __setitem__(self, key: int, hook: Any) -> None:
        if not (self.running.open or _harmless(hook)):
            raise AutoTPError(self.refusal)
        super().__setitem__(key, hook)

    def __deepcopy__(self, memo: dict[int, Any]) -> InnerHooks:
        made = InnerHooks(self.refusal, copy.deepcopy(self.running, memo))
        memo[id(self)] = made
        for key, hook in self.items():
            OrderedDict.__setitem__(made, key, copy.deepcopy(hook, memo))
        return made

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter(self.items())


class GuardedHooks(OrderedDict[int, Any]):
    """One table of hooks of a module whose values are whole, but not their gradients: see `own_grad`."""

    def __init__(self, argument: type[Copied] | None, result: type[Copied] | None, before: bool, running: Running) -> None:
        super().__init__()
        self.given, self.running = (argument, result, before), running

    def let_go(self) -> None:
        """Keep hooks as they are given from now on: the model is parallel no more."""
        self.running = Running()
        self.running.open = True
        for key, hook in self.items():
            if isinstance(hook, Hook):
                super().__setitem__(key, hook.hook)

    def __setitem__(self, key: int, hook: Any) -> None:
        plain = self.running.open or _harmless(hook) or isinstance(hook, Hook)
        super().__setitem__(key, hook if plain else Hook(hook, *self.given))

    def __deepcopy__(self, memo: dict[int, Any]) -> GuardedHooks:
        made = GuardedHooks(*self.given, copy.deepcopy(self.running, memo))
        memo[id(self)] = made
        made.update((key, copy.deepcopy(hook, memo)) for key, hook in self.items())
        return made

    def __reduce__(self) -> Any:
        return OrderedDict, (), None, None, iter((k, h.hook if isinstance(h, Hook) else h) for k, h in self.items())


def _harmless(hook: Any) -> bool:
    while isinstance(hook, functools.partial):
        hook = hook.func
    return isinstance(hook, Observer) or is_torchs(hook)


def refused(table: str, boundaries: Iterable[Boundary]) -> list[Boundary]:
    """Names the values that a hook in `table` would not get as on one device."""
    return [
        b
        for b in boundaries
        if (table != _FORWARD_PRE or not b.result)
        and (table != _BACKWARD_PRE or b.result)
        and (table in (_BACKWARD, _BACKWARD_PRE) or b.shown is not Shown.GRADIENT)
    ]


class Watch:
    """Checks the hooks that no table can refuse: hooks on all modules, and those beside hooks that were there before."""

    __slots__ = ("everywhere", "tables")

    def __init__(self) -> None:
        self.everywhere = {table: frozenset(getattr(torch_module, name)) for table, name in _GLOBAL.items()}
        self.tables: list[tuple[Mapping[int, Any], frozenset[int], str]] = []

    def check(self) -> None:
        """Raise where a hook was added that would get other than whole values.

        Raises:
            AutoTPError: says which.
        """
        if (
            torch_module._global_forward_hooks
            or torch_module._global_forward_pre_hooks
            or torch_module._global_backward_hooks
            or torch_module._global_backward_pre_hooks
        ):
            for table, name in _GLOBAL.items():
                new = {k: h for k, h in getattr(torch_module, name).items() if k not in self.everywhere[table]}
                if not all(map(_harmless, new.values())):
                    raise AutoTPError(
                        f"a {_WORDS[table]} on all modules was registered after parallelize: in modules that run on a rank's part it would "
                        "see other values than on one device. Register it before parallelize, or on the modules that it is meant for"
                    )
        for hooks, known, refusal in self.tables:
            if len(hooks) > len(known) and not all(k in known or _harmless(h) for k, h in hooks.items()):
                raise AutoTPError(refusal)


def _guarded(path: str, table: str, plan: Plan, running: Running) -> GuardedHooks | None:
    """The table of hooks of a module whose values are whole; None where their gradients are whole too."""
    if table not in (_FORWARD, _FORWARD_PRE):
        return None
    summed = {b.result for b in plan.boundaries.get(path, ()) if b.shown is Shown.GRADIENT}
    argument = Summed if False in summed else None
    result = None if table == _FORWARD_PRE else Summed if True in summed else Copied if plan.copies.get(path) else None
    return GuardedHooks(argument, result, table == _FORWARD_PRE, running) if argument or result else None


def install_hooks(model: nn.Module, plan: Plan, running: Running, undo: Undo) -> Watch:
    """Make modules inside of regions refuse hooks; journalled in `undo`. Every call has to check the `Watch` returned."""
    watch = Watch()
    for path in dict.fromkeys((*plan.boundaries, *plan.copies)):
        module = model.get_submodule(path)
        for table, word in _WORDS.items():
            inner = refused(table, plan.boundaries.get(path, ()))
            if not inner:
                guarded, before = _guarded(path, table, plan, running), module.__dict__[table]
                if guarded is not None and before:  # handles of these hooks know their table, which guards nothing
                    refusal = (
                        f"{path or 'the model'}: no {word} can be put here after parallelize beside those that were there before: the "
                        "gradient of what it sees is not that of one device. Register it before parallelize as well"
                    )
                    watch.tables.append((before, frozenset(before), refusal))
                elif guarded is not None:
                    _put(module, table, guarded, undo)
                continue
            refusal = (
                f"{path}: no {word} can be put here after parallelize: {inner[0]} is {_SAYS[inner[0].shown]}. Hook a module whose "
                "arguments and results are whole (the attention, the mlp or the block around it), or register the hook before parallelize"
            )
            before = module.__dict__[table]
            if before:  # handles of these hooks know their table
                watch.tables.append((before, frozenset(before), refusal))
            else:
                _put(module, table, InnerHooks(refusal, running), undo)
    return watch


def _put(module: nn.Module, table: str, guarded: GuardedHooks | InnerHooks, undo: Undo) -> None:
    """Have a module keep its hooks in `guarded`; hooks that come stay in it, as their handles know no other table."""
    before = module.__dict__[table]

    def back() -> None:
        guarded.let_go()
        if not guarded:
            module.__dict__[table] = before

    module.__dict__[table] = guarded
    undo.push(back)
