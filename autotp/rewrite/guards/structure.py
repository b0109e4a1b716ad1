"""Checks that the modules that a plan was made for are still there when they run.

The guard watches the children of every module, its class and a forward of its own. A module that is replaced, wrapped, removed, or
added inside of a region would compute on a rank's part as if it were whole. Changes that stay right are accepted, and watched from
then on:

- wrappers that only pass on (checkpointing, compilation, FSDP), and any wrapper around a module whose boundary is whole;
- modules that a forward itself put there while it was traced, made of the parameters of those before;
- modules that replace others that the plan did not touch, or that are added where every value is whole. Their tensors must be the
  same on all ranks, which is compared once. A module of the plan under another name, or a copy of one, is no such module: its plan
  depends on the place that it was traced in.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import nn

from autotp.digest import digest, tensor_digest
from autotp.errors import AutoTPError, ChangedError
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.modules.classes import BASE
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.trace.forms import class_name
from autotp.trace.reading import Reading, is_container, is_list, outside, own_methods

#: By which code goes over the modules in its own.
_ALL_OF_THEM = ("_modules", "children", "modules", "named_children", "named_modules")
_ADVICE = "Make the change before parallelize (build the model again), or take it back"


@dataclass(frozen=True, slots=True)
class Places:
    """Sorts modules, by path, by what the plan does with them.

    inner: not every value at its boundary is whole. runs: its own code runs on parts. changed: that, or something is done around
    it. touched: it, or something in it, is sharded or rewritten. swapped: (path, class) of the modules that its own forwards put
    there while tracing. local: (path, name) of attributes that have this rank's value. idle: no traced call ran it.
    """

    inner: Collection[str]
    runs: Collection[str]
    changed: Collection[str]
    touched: Collection[str]
    swapped: Collection[tuple[str, str]] = ()
    local: Collection[tuple[str, str]] = ()
    idle: Collection[str] = ()

    def parts_of(self, path: str) -> set[str]:
        """Returns the names by which code around the module at `path` would reach what is a rank's own in it."""
        under = path + "."
        modules = {inner.rpartition(".")[2] for inner in self.inner if inner.startswith(under)}
        return modules | {name for at, name in self.local if at == path or at.startswith(under)}


class Structure:
    """Remembers the modules under one module as they were."""

    def __init__(self, modules: Sequence[tuple[str, nn.Module]], places: Places, comm: Comm) -> None:
        self.paths = tuple(path for path, _ in modules)
        self.places, self.comm = places, comm
        self.modules = [m for _, m in modules]
        self._look()
        self.kinds: list[type] = [type(m) for m in self.modules]
        self.children = [dict(m._modules) for m in self.modules]
        self.forwards = [d.get("forward") for d in self.attributes]

    def _look(self) -> None:
        self.attributes = [m.__dict__ for m in self.modules]

    def __deepcopy__(self, memo: dict[int, Any]) -> Structure:
        made = memo[id(self)] = object.__new__(Structure)
        made.paths, made.places, made.comm, made.kinds = self.paths, self.places, self.comm, list(self.kinds)
        made.modules = copy.deepcopy(self.modules, memo)
        made.children = copy.deepcopy(self.children, memo)
        made.forwards = copy.deepcopy(self.forwards, memo)
        made._look()
        return made

    def differs(self) -> bool:
        """True where a module has changed, be it right or wrong."""
        attributes = self.attributes
        return (
            [d["_modules"] for d in attributes] != self.children
            or [*map(type, self.modules)] != self.kinds
            or [d.get("forward") for d in attributes] != self.forwards
        )

    def judge(self) -> None:
        """Raise where a change is not right. Collective where a module with tensors was added.

        Raises:
            ChangedError: names the module. AutoTPError: ranks have different ones.
        """
        for i in range(len(self.modules)):
            self._judge(i)

    def _judge(self, i: int) -> None:
        path, module, before = self.paths[i], self.modules[i], self.children[i]
        if module._modules != before:
            for name in dict.fromkeys((*before, *module._modules)):
                old, new = before.get(name), module._modules.get(name)
                if old is not new:
                    self._judge_child(path, f"{path}.{name}" if path else name, old, new)
            self.children[i] = dict(module._modules)
        kind, now = self.kinds[i], type(module)
        if now is not kind:
            passes = issubclass(now, kind) and _calls(now.forward, kind.forward, kind) and not _replaces(now, kind)  # type: ignore[attr-defined]
            if not passes and (path in self.places.touched or self._asks_for(path, True)):
                where = path or "the model"
                raise ChangedError(f"{where} was a {_name(kind)} when the model was made parallel, is a {_name(now)} now. {_ADVICE}")
            self.kinds[i] = now
        old_forward, new_forward = self.forwards[i], module.__dict__.get("forward")
        if old_forward != new_forward:
            if path in self.places.changed and not _calls(new_forward, old_forward, kind):
                where = f"{path or 'the model'} ({_name(now)})"
                raise ChangedError(
                    f"{where} was given another forward after parallelize, which knows nothing of this rank's part. {_ADVICE}"
                )
            self.forwards[i] = new_forward

    def _judge_child(self, parent: str, path: str, old: nn.Module | None, new: nn.Module | None) -> None:
        places = self.places
        if new is None:
            raise ChangedError(f"{path}, a {_name(type(old))} when the model was made parallel, is gone. {_ADVICE}")
        if old is None:
            parent, _ = self._owner(path)
            if parent in places.runs:
                why = self._made_parallel(new) or "would compute as if it were whole"
                raise ChangedError(
                    f"{path}, a {_name(type(new))}, was added after parallelize to a module that runs on a rank's part, and {why}. "
                    f"{_ADVICE}"
                )
        elif is_list(old) and is_list(new):
            for name in dict.fromkeys((*old._modules, *new._modules)):
                one, other = old._modules.get(name), new._modules.get(name)
                if one is not other:
                    self._judge_child(path, f"{path}.{name}", one, other)
            return
        elif (path, class_name(type(new))) in places.swapped and {*map(id, new.parameters())} <= {*map(id, old.parameters())}:
            return  # the plan is made for it
        elif not _passes_on(new, old):
            wraps = path not in places.inner and any(m is old for m in new.modules())
            if wraps and (name := _reached(new, old, places.parts_of(path))):
                raise ChangedError(
                    f"{path} was a {_name(type(old))} when the model was made parallel, is {_another(old, new)} now, whose code reads "
                    f"{name} of what it wraps: that is this rank's own. {_ADVICE}"
                )
            if not wraps and (path in places.inner or path in places.touched):
                why = self._made_parallel(new, old.modules()) or "knows nothing of this rank's part"
                raise ChangedError(
                    f"{path} was a {_name(type(old))} when the model was made parallel, is {_another(old, new)} now, which {why}. {_ADVICE}"
                )
        else:
            return
        if old is not None and (asks := self._asks_for(path, type(new) is not type(old))):
            raise ChangedError(
                f"{path} was a {_name(type(old))} when the model was made parallel, is {_another(old, new)} now, and {asks}. {_ADVICE}"
            )
        if why := self._made_parallel(new, () if old is None else old.modules()):
            raise ChangedError(f"{path}, a {_name(type(new))} that came after parallelize, {why}. {_ADVICE}")
        self._same_everywhere(path, old, new)

    def _owner(self, path: str) -> tuple[str, nn.Module | None]:
        """Returns the module whose code reaches the one at `path`, past lists and dicts."""
        known = dict(zip(self.paths, self.modules, strict=True))
        owner = path.rpartition(".")[0]
        while owner in known and owner and is_container(known[owner]):  # whose code goes over it
            owner = owner.rpartition(".")[0]
        return owner, known.get(owner)

    def _asks_for(self, path: str, differs: bool) -> str:
        """Says what code on parts may do otherwise for a module in the place of another, though what it makes is whole; "" for nothing.

        differs: it is of another class.

        What the code does with a module that no traced call ran is not known: it may ask for its class, or read what it holds.
        """
        owner, module = self._owner(path)
        if module is None or owner not in self.places.runs:
            return ""
        name = path[len(owner) + 1 :] if owner else path
        code = Reading().of(getattr(type(module), BASE, type(module)))
        if name in code.classed and differs:
            return f"the code of {owner or 'the model'}, which runs on a rank's part, asks for its class"
        if path in self.places.idle and not (code.read | code.asked).isdisjoint((*name.split("."), *_ALL_OF_THEM)):
            return f"no call that was traced ran it: the code of {owner or 'the model'}, which runs on a rank's part, may take another path"
        return ""

    def _made_parallel(self, new: nn.Module, known: Iterable[nn.Module] = ()) -> str:
        """Says why `new`, besides the modules `known`, is fit for one place of this plan alone; "" where it is not.

        It is, or contains, a module of the plan under another name, or the copy of one: such a module's plan depends on its place.
        """
        if self.comm.size == 1:
            return ""
        paths = {id(m): path for path, m in zip(self.paths, self.modules, strict=True)}
        left_alone = {*map(id, known)}
        for inside, module in new.named_modules():
            if id(module) in left_alone:
                continue
            path = paths.get(id(module))
            if path and path in self.places.touched:
                return f"is {path} of the parallel model under another name" if not inside else f"has {path} of the parallel model in it"
            cut = next((n for n, p in module._parameters.items() if isinstance(p, LayoutDTensor) and p._layout.dim is not None), None)
            if cut is not None:
                return f"holds a rank's part of {f'{inside}.{cut}' if inside else cut} of a parallel model"
        return ""

    def _same_everywhere(self, path: str, old: nn.Module | None, new: nn.Module) -> None:
        known = {id(t) for m in (() if old is None else (old,)) for t in (*m.parameters(), *m.buffers())}
        tensors = {n: t for n, t in (*new.named_parameters(), *new.named_buffers()) if id(t) not in known}
        if not tensors or self.comm.size == 1 or any(t.is_meta for t in tensors.values()):
            return
        own = digest(repr({n: tensor_digest(t) for n, t in tensors.items()}))
        device = next(iter(tensors.values())).device
        everyone = [int(t) for t in self.comm.all_gather(torch.tensor([own], device=device))]
        if len(set(everyone)) > 1:
            rank = next(i for i, other in enumerate(everyone) if other != everyone[0])
            raise AutoTPError(
                f"{path}, a {_name(type(new))} that came after parallelize, has other weights on rank {rank} than on rank 0: seed all "
                "ranks alike before making it, or load the same weights"
            )


def _name(kind: type) -> str:
    return kind.__qualname__


def _replaces(now: type, kind: type) -> bool:
    """True where a class made of another has methods in place of those that the forward of the other calls. Torch's (FSDP's) pass on."""
    own = frozenset[str]().union(*(own_methods(c) for c in outside(now) if c not in kind.__mro__)) - {"forward"}
    return not own.isdisjoint(Reading().of(getattr(kind, BASE, kind)).read)


def _another(old: nn.Module, new: nn.Module) -> str:
    return f"another {_name(type(new))}" if _name(type(new)) == _name(type(old)) else f"a {_name(type(new))}"


def _reached(new: nn.Module, old: nn.Module, parts: Collection[str]) -> str:
    """Returns one of the names `parts` that the code of a wrapper reads, or may read by `getattr`; "" where it reads none."""
    if not parts:
        return ""
    reading, known = Reading(), {*map(id, old.modules())}
    for module in new.modules():
        if id(module) not in known and not is_container(module):
            read = reading.of(type(module)).read
            if clash := sorted(read.intersection(parts)):
                return clash[0]
            if "getattr" in getattr(type(module).forward, "__code__", _no_code).co_names:
                return f"something (by getattr, {', '.join(sorted(parts)[:3])} perhaps)"
    return ""


_no_code = (lambda: None).__code__


def _passes_on(new: nn.Module, old: nn.Module) -> bool:
    """True for a wrapper of torch's (or several) that calls `old` with its own arguments, and returns the result of `old`."""
    from torch._dynamo.eval_frame import OptimizedModule
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.nn.parallel import DistributedDataParallel

    wrappers = (ActivationWrapper, OptimizedModule, FullyShardedDataParallel, DistributedDataParallel)
    while isinstance(new, wrappers):
        inside: Mapping[str, nn.Module | None] = new._modules
        found = [m for m in inside.values() if m is not None]
        if len(found) != 1:
            return False
        new = found[0]
        if new is old:
            return True
    return False


def _calls(new: Any, old: Any, kind: type) -> bool:
    """True for `old` itself, and for a forward that says of itself that it wraps `old`. `old` None: the forward of the class."""
    for _ in range(16):
        if new == old or (old is None and isinstance(new, MethodType) and new.__func__ is kind.forward):  # type: ignore[attr-defined]
            return True
        new = getattr(new, "_torchdynamo_orig_callable", None) or getattr(new, "__wrapped__", None)
        if new is None:
            break
    return False
