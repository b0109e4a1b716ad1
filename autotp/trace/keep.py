"""Remembers everything that a traced run may change besides tensors, and puts it back.

Code caches masks in a dict of the module, appends to a list, counts in a class attribute, draws from a generator of its own. During
a trace it puts fake tensors there, so none of it may stay. Restored are attributes, tables and hooks of modules, contents of
containers and plain objects they hold, attributes of their classes, globals of the files that define those, and random generators.
"""

from __future__ import annotations

import logging
import random
import sys
import warnings
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from operator import is_
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Undo = list[Callable[[], object]]
_TABLES = frozenset(k for k, v in nn.Module().__dict__.items() if isinstance(v, dict))
_DICTS = (dict, OrderedDict, defaultdict)
_FOREIGN = frozenset(("torch", "numpy")) | sys.stdlib_module_names
#: Containers with more items are kept as they are, but what is in the items is not looked at.
_LONG = 4096


@contextmanager
def undone() -> Iterator[Undo]:
    """Undoes at its end, in reverse order, the steps that were pushed inside."""
    undo: Undo = []
    try:
        yield undo
    finally:
        while undo:
            undo.pop()()


def keep_state(model: nn.Module, undo: Undo) -> None:
    """Remember everything that the forwards of `model` may change; `undo` puts it back, every object in its place."""
    keeper = _Keeper(undo)
    for module in model.modules():
        keeper.attributes(module)
    for cls in dict.fromkeys(c for m in model.modules() for c in type(m).__mro__):
        file = sys.modules.get(cls.__module__)
        if _package(cls) not in _FOREIGN:
            keeper.cls(cls)
            if file is not None:
                keeper.file(file)


class _Keeper:
    def __init__(self, undo: Undo) -> None:
        self.undo = undo
        self.seen: dict[int, Any] = {}  # the objects are held, so that ids stay theirs

    def attributes(self, module: nn.Module) -> None:
        """Keeps attributes, tables and hooks of one module."""
        attributes = module.__dict__
        self._table(attributes)
        for key, value in attributes.items():
            if key in _TABLES and isinstance(value, dict):
                self._table(value)
            else:
                self.value(value)

    def cls(self, cls: type) -> None:
        """Keeps the attributes of a class: data that its code counts or caches in."""
        before = {k: v for k, v in vars(cls).items() if _is_data(k, v)}
        self.undo.append(partial(_restore_class, cls, before))
        self.values(v for k, v in vars(cls).items() if k != "__dict__")

    def file(self, module: ModuleType) -> None:
        """Keeps the globals of a file."""
        if id(module) in self.seen:
            return
        self.seen[id(module)] = module
        space = vars(module)
        self._table(space)
        self.values(v for v in space.values() if isinstance(v, (list, set, deque, Tensor, *_DICTS)))

    def values(self, items: Iterable[Any]) -> None:
        """Keeps each of `items`."""
        for item in items:
            self.value(item)

    def value(self, value: Any) -> None:
        """Keeps the contents of `value`, if it is a container, a plain object, a generator or a function with things closed over."""
        if value is None or isinstance(value, (str, int, float, nn.Module, type, ModuleType)) or id(value) in self.seen:
            return
        self.seen[id(value)] = value
        if isinstance(value, Tensor):
            self._tensor(value)
        elif isinstance(value, (tuple, frozenset)):
            if len(value) <= _LONG:
                self.values(value)
        elif type(value) in _DICTS:
            self._table(value)
            self._short(value.values())
        elif type(value) in (list, deque):
            before = list(value)
            self.undo.append(partial(_restore_list, value, before))
            self._short(before)
        elif type(value) is set:
            self.undo.append(partial(_restore_set, value, set(value)))
        elif isinstance(value, FunctionType):
            self._function(value)
        elif isinstance(value, MethodType):
            self.values((value.__self__, value.__func__))
        elif isinstance(value, partial):
            self.values((value.func, value.args, value.keywords))
        elif not self._generator(value) and (type(value) is SimpleNamespace or _package(type(value)) not in _FOREIGN):
            self._object(value)

    def _tensor(self, tensor: Tensor) -> None:
        """Keeps a tensor that no module has registered. Large ones are no counters, and copies of them would be dear."""
        if type(tensor) is Tensor and tensor.layout is torch.strided and tensor.numel() <= _LONG and not tensor.is_meta:
            self.undo.append(partial(_restore_tensor, tensor, tensor._version, tensor.detach().clone(), tensor.requires_grad))

    def _object(self, value: Any) -> None:
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict):
            self._table(attributes)
            self._short(list(attributes.values()))

    def _short(self, items: Any) -> None:
        if len(items) <= _LONG:
            self.values(items)

    def _function(self, function: FunctionType) -> None:
        self.values(function.__defaults__ or ())
        self.values((function.__kwdefaults__ or {}).values())
        for cell in function.__closure__ or ():
            try:
                before = cell.cell_contents
            except ValueError:  # not set yet
                continue
            self.undo.append(partial(setattr, cell, "cell_contents", before))
            self.value(before)

    def _generator(self, value: Any) -> bool:
        if isinstance(value, torch.Generator):
            self.undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, random.Random):
            self.undo.append(partial(value.setstate, value.getstate()))
        elif isinstance(value, np.random.RandomState):
            self.undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, np.random.Generator):
            self.undo.append(partial(setattr, value.bit_generator, "state", value.bit_generator.state))
        else:
            return False
        return True

    def _table(self, table: dict[Any, Any]) -> None:
        if not table:  # most tables of a module are empty, and stay so
            self.undo.append(table.clear)
            return
        self.undo.append(partial(_restore_dict, table, dict(table)))


def _restore_dict(table: dict[Any, Any], before: dict[Any, Any]) -> None:
    # no loop of Python code: a trace leaves nearly all of the thousands of tables as they were
    if table.keys() != before.keys() or not all(map(is_, map(table.get, before), before.values())):
        table.clear()
        table.update(before)


def _restore_tensor(tensor: Tensor, version: int, before: Tensor, trained: bool) -> None:
    if tensor._version != version:
        with torch.no_grad():
            tensor.copy_(before)
    if tensor.is_leaf and tensor.requires_grad != trained:
        tensor.requires_grad_(trained)


def _restore_list(items: list[Any] | deque[Any], before: list[Any]) -> None:
    if len(items) != len(before) or any(a is not b for a, b in zip(items, before, strict=True)):
        items.clear()
        items.extend(before)


def _restore_set(items: set[Any], before: set[Any]) -> None:
    if items != before:
        items.clear()
        items.update(before)


def _package(cls: type) -> str:
    return "" if cls.__module__ == "__main__" else cls.__module__.partition(".")[0]


def _is_data(name: str, value: Any) -> bool:
    return not name.startswith("__") and not isinstance(value, FunctionType)


def _restore_class(cls: type, before: dict[str, Any]) -> None:
    for name in [k for k, v in vars(cls).items() if _is_data(k, v) and k not in before]:
        delattr(cls, name)
    for name, value in before.items():
        if vars(cls).get(name) is not value:
            setattr(cls, name, value)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores afterwards all that the forwards of `model` may change: its state, random states, torch's settings. Nothing is
    printed inside.

    torch logs every refusal of a fake operator as an error with a traceback, and models warn about their arguments. The paths that
    are merely tried would fill the screen. The plan's notes and our errors tell all that matters about them.
    """
    numbers, host = np.random.get_state(), random.getstate()
    dtype, grad, precision = torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with undone() as undo, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            keep_state(model, undo)
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.set_float32_matmul_precision(precision)
        torch.set_grad_enabled(grad)
        torch.set_default_dtype(dtype)
        np.random.set_state(numbers)
        random.setstate(host)
