"""Writes down, as lines of text, everything that the code of a model can reach.

    Walk(names).over(model) → lines

The walk starts at an object and follows what it holds: attributes, items, closures, classes and their bases. Of a function it writes its
bytecode, and follows the globals that the bytecode names. Functions of installed libraries are followed by name alone: a method of
theirs counts once some code that was reached names it. So a model of transformers reaches a thousand functions, and not all of them.

Equal lines mean equal plans, as far as the walk sees; different lines cost a plan. What it cannot see is `Unseen`: an object of a kind that
it does not know, and code that reads files, the environment or other code by name.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import hashlib
import re
import sys
import types
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autotp.cache.inert import INERT, SPELLED, VOLATILE, held_by
from autotp.digest import tensor_digest

#: Packages that a version stands for. What others have put into them is found and followed.
VERSIONED = frozenset(("torch", "numpy", "builtins", "autotp")) | sys.stdlib_module_names
_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
#: What code that is not installed must not name: what it gets by these is not in the walk.
_OUTSIDE = frozenset(("environ", "getenv", "open", "eval", "exec", "compile", "globals", "__import__", "import_module", "read_text"))
_OUTSIDE |= {
    "environb",
    "argv",
    "stdin",
    "exists",
    "is_file",
    "is_dir",
    "listdir",
    "scandir",
    "iterdir",
    "read_bytes",
    "fromfile",
    "loadtxt",
}
_BUILT_IN = (
    types.BuiltinFunctionType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.WrapperDescriptorType,
    types.MethodDescriptorType,
    types.MethodWrapperType,
    types.ClassMethodDescriptorType,
)
_IMPORTS = dis.opmap["IMPORT_NAME"]


class Unseen(Exception):
    """Something has no text; says what."""


class Walk:
    """Collects the lines. `numbers`: also the numbers in parameters; those in all other tensors always count."""

    def __init__(self, numbers: bool) -> None:
        self.lines: list[str] = []
        self.names: set[str] = set()
        self.packages: set[str] = set()
        self._numbers = numbers
        self._seen: dict[int, tuple[int, Any]] = {}  # id → (number, the object, which is held so that its id stays its own)
        self._todo: deque[tuple[int, Any]] = deque()
        self._waiting: defaultdict[str, list[Any]] = defaultdict(list)  # name → what libraries have under it, while no code names it
        self._storages: dict[int, int] = {}

    def over(self, item: Any) -> list[str]:
        """Returns the lines, those of `item` added.

        Raises:
            Unseen: something in it has no text.
        """
        self.lines.append(self._of(item))
        while self._todo:
            number, found = self._todo.popleft()
            self.lines.append(f"{number} {self._line(found)}")
        return self.lines

    def _of(self, item: Any) -> str:
        """The text of plain data; of anything else the number of its line."""
        if item is None or item is Ellipsis or item is NotImplemented or type(item) in _PLAIN:
            return repr(item)
        if isinstance(item, enum.Enum):
            return f"{self._of(type(item))}.{item.name}"
        key = id(item)
        if key not in self._seen:
            self._seen[key] = len(self._seen), item
            self._todo.append(self._seen[key])
        return f"#{self._seen[key][0]}"

    def _all(self, items: Iterable[Any]) -> str:
        return "[" + ",".join(map(self._of, items)) + "]"

    # kinds of objects ---------------------------------------------------------------------------------------------------------

    def _line(self, item: Any) -> str:
        kind = type(item)
        name = f"{kind.__module__}.{kind.__qualname__}"
        if isinstance(item, types.FunctionType):
            return self._function(item)
        if isinstance(item, type):
            return self._class(item)
        if isinstance(item, Tensor):
            return self._tensor(item)
        if isinstance(item, types.ModuleType):
            return self._file(item)
        if isinstance(item, types.CodeType):
            return self._code(item)
        if isinstance(item, _BUILT_IN):
            owner = getattr(item, "__self__", None)
            bound = "" if owner is None or isinstance(owner, types.ModuleType) else self._of(owner)
            return f"{name} {getattr(item, '__module__', '')}.{item.__qualname__} {bound}"
        if isinstance(item, (np.ndarray, np.generic)):
            if item.dtype.hasobject:
                raise Unseen("a numpy array of objects")
            return f"{name} {item.dtype}{item.shape}{hashlib.blake2b(np.ascontiguousarray(item).tobytes()).hexdigest()}"
        if isinstance(item, torch.Generator):
            return f"{name} {hashlib.blake2b(item.get_state().numpy().tobytes()).hexdigest()}"
        if isinstance(item, re.Pattern):
            return f"{name} {item.pattern!r} {item.flags}"
        if isinstance(item, PurePath) or (kind.__module__ in ("typing", "types") and kind is not types.SimpleNamespace) or name in SPELLED:
            return f"{name} {item!s}"
        if name in INERT:
            return name
        held = held_by(item)
        if held is not None:
            return f"{name} {self._all(held)}"
        return f"{name} {self._contents(item)}"

    def _contents(self, item: Any) -> str:
        """Items of a container, and attributes."""
        known, text = False, self._of(type(item)) if type(item).__module__ != "builtins" else ""
        if isinstance(item, (set, frozenset)):
            if not all(type(x) in _PLAIN or isinstance(x, (type, enum.Enum)) or x is None for x in item):
                raise Unseen("a set of objects, whose order is another one each time")
            text, known = text + self._all(sorted(item, key=lambda x: f"{type(x)}{getattr(x, '__qualname__', x)}")), True
        elif isinstance(item, (list, tuple, deque)):
            text, known = f"{text}{self._all(item)}{item.maxlen if isinstance(item, deque) else ''}", True
        elif isinstance(item, dict):
            pairs = [f"{self._of(k)}:{self._of(v)}" for k, v in list(item.items())]
            factory = self._of(item.default_factory) if isinstance(item, defaultdict) else ""
            text, known = f"{text}{factory}{{{','.join(pairs)}}}", True
        attributes = getattr(item, "__dict__", None)
        if isinstance(attributes, dict):
            text, known = text + "".join(f" {k}={self._of(v)}" for k, v in list(attributes.items()) if k not in VOLATILE), True
        for cls in type(item).__mro__:
            slots = cls.__dict__.get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                known = True
                if slot not in ("__dict__", "__weakref__") and hasattr(item, slot):
                    text += f" {slot}={self._of(getattr(item, slot))}"
        if not known:
            raise Unseen(f"an object of {type(item).__module__}.{type(item).__qualname__}")
        return text

    def _tensor(self, t: Tensor) -> str:
        inner = t.layout is torch.strided and not t.is_nested
        form = f"{type(t).__module__}.{type(t).__qualname__} {t.dtype}{tuple(t.shape)}{t.layout}{t.device.type}{t.requires_grad}{t.is_leaf}"
        if inner and type(t) in (Tensor, nn.Parameter):
            storage = t.untyped_storage()._cdata
            form += f"{t.stride()}{t.storage_offset()}{t.is_conj()}{t.is_neg()}@{self._storages.setdefault(storage, len(self._storages))}"
        if t._backward_hooks:
            form += self._of(t._backward_hooks)
        form += " grad" if t.is_leaf and t.grad is not None else ""
        if self._numbers or not isinstance(t, nn.Parameter):
            form += tensor_digest(t)
        return form + "".join(f" {k}={self._of(v)}" for k, v in vars(t).items())

    # code ---------------------------------------------------------------------------------------------------------------------

    def _class(self, cls: type) -> str:
        self.packages.add(_package(cls.__module__))
        made_by = "" if type(cls) is type else self._of(type(cls))
        text = f"class {cls.__module__}.{cls.__qualname__} {made_by} {self._all(cls.__mro__[1:])}"
        entries = list(vars(cls).items())
        if _package(cls.__module__) in VERSIONED:
            return text + "".join(f" {k}={self._of(v) if _put_in(v) else _named_as(v)}" for k, v in entries)
        if issubclass(cls, enum.Enum):
            text += "".join(f" {m.name}={self._of(m.value)}{self._attributes(m)}" for m in cls)
        if _installed(sys.modules.get(cls.__module__)):
            for key, value in entries:
                self._named(key, value)
            return text
        skipped = ("__dict__", "__weakref__", "__doc__", "__module__", "_abc_impl")
        return text + "".join(f" {k}={self._of(v)}" for k, v in entries if k not in skipped)

    def _attributes(self, item: Any) -> str:
        return "".join(f" {k}={self._of(v)}" for k, v in vars(item).items() if not (k.startswith("_") and k.endswith("_")))

    def _file(self, module: types.ModuleType) -> str:
        """A module of Python. One that is not installed counts as a whole."""
        package = _package(module.__name__)
        self.packages.add(package)
        text = f"module {module.__name__}"
        if package in VERSIONED or _installed(module):
            return text
        return text + "".join(f" {k}={self._of(v)}" for k, v in list(vars(module).items()) if not k.startswith("__"))

    def _named(self, name: str, value: Any) -> None:
        """Something that a library has under a name: it counts as soon as code names it. Methods that Python calls count always."""
        if name in self.names or (name.startswith("__") and name.endswith("__") and isinstance(value, types.FunctionType)):
            self.lines.append(f"{name} {self._of(value)}")
        else:
            self._waiting[name].append(value)

    def _function(self, function: types.FunctionType) -> str:
        home = str(function.__globals__.get("__name__", ""))
        self.packages.add(_package(home))
        text = f"function {home}.{function.__qualname__}"
        if _package(home) in VERSIONED:
            return f"{text} {_digest(function.__code__)}{self._held(function)}"
        names = sorted(set(_names(function.__code__)))
        installed = _installed(sys.modules.get(home))
        if not installed and (bad := _OUTSIDE.intersection(names)):
            raise Unseen(f"{text}, which uses {', '.join(sorted(bad))}")
        for name in names:
            if name not in self.names:
                self.names.add(name)
                for value in self._waiting.pop(name, ()):
                    self.lines.append(f"{name} {self._of(value)}")
        reached = [f"{name}={self._of(function.__globals__[name])}" for name in names if name in function.__globals__]
        for name in names:
            value = function.__globals__.get(name)
            if isinstance(value, types.ModuleType):
                reached += self._through(value, names, set())
        reached += self._imported(function, installed)
        for name in names:  # what others have put into Python itself
            value = vars(builtins).get(name) if name not in function.__globals__ else None
            if isinstance(value, (types.FunctionType, functools.partial)):
                reached.append(f"{name}={self._of(value)}")
        return f"{text} {_digest(function.__code__)}{self._held(function)} {' '.join(reached)}"

    def _held(self, function: types.FunctionType) -> str:
        cells = []
        for cell in function.__closure__ or ():
            try:
                cells.append(self._of(cell.cell_contents))
            except ValueError:  # it is empty yet
                cells.append("")
        attributes = [f"{k}={self._of(v)}" for k, v in vars(function).items() if k not in VOLATILE]
        return f"{cells}{self._all(function.__defaults__ or ())}{self._of(function.__kwdefaults__)}{attributes}"

    def _through(self, module: types.ModuleType, names: Iterable[str], seen: set[int]) -> Iterator[str]:
        """Yields what code that names `names` finds in a module of Python, and in modules in it."""
        if id(module) in seen:
            return
        seen.add(id(module))
        versioned = _package(module.__name__) in VERSIONED
        for name in names:
            value = vars(module).get(name)
            if isinstance(value, types.ModuleType):
                yield from self._through(value, names, seen)
            if value is not None:
                whole = not versioned or _put_in(value) or isinstance(value, functools.partial)
                yield f"{module.__name__}.{name}={self._of(value) if whole else _named_as(value)}"

    def _imported(self, function: types.FunctionType, installed: bool) -> Iterator[str]:
        """Yields the modules that a function imports when it runs."""
        for code in _codes(function.__code__):
            if _IMPORTS not in code.co_code[::2]:
                continue
            package = str(function.__globals__.get("__package__") or "")
            found = [m for n in code.co_names for full in (n, f"{package}.{n}") if (m := sys.modules.get(full)) is not None]
            if not installed and not found:
                raise Unseen(f"function {function.__qualname__}, which imports what is not loaded yet")
            for module in found:
                if not installed or _package(module.__name__) not in VERSIONED:
                    yield from self._through(module, sorted(set(_names(code))), set())
                    yield self._of(module)

    def _code(self, code: types.CodeType) -> str:
        return f"code {_digest(code)}"


def _package(module: str) -> str:
    return "" if module == "__main__" else module.partition(".")[0]


@functools.cache
def _folders() -> tuple[str, ...]:
    return tuple(p for p in sys.path if p.rstrip("/\\").endswith(("site-packages", "dist-packages")))


def _installed(module: types.ModuleType | None) -> bool:
    file = getattr(module, "__file__", None)
    return isinstance(file, str) and file.startswith(_folders())


def _named_as(value: Any) -> str:
    """The name of a function or class of a package that a version stands for: another one may have been put there; plain data as it is."""
    if value is None or type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, (types.FunctionType, type, *_BUILT_IN)):
        return f"{getattr(value, '__module__', '')}.{value.__qualname__}"
    return type(value).__qualname__


def _put_in(value: Any) -> bool:
    """True for a function or class of another package than those that a version stands for."""
    while isinstance(value, (staticmethod, classmethod)):
        value = value.__func__
    if isinstance(value, property):
        return any(map(_put_in, (value.fget, value.fset)))
    if isinstance(value, types.FunctionType):
        return _package(str(value.__globals__.get("__name__", ""))) not in VERSIONED
    return isinstance(value, type) and _package(value.__module__) not in VERSIONED


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names(code: types.CodeType) -> Iterator[str]:
    """The names in a function: of globals and attributes, and texts that could be one."""
    for one in _codes(code):
        yield from one.co_names
        for constant in one.co_consts:
            items = constant if isinstance(constant, (tuple, frozenset)) else (constant,)
            yield from (x for x in items if isinstance(x, str) and x.isidentifier())


def _digest(code: types.CodeType) -> str:
    return hashlib.blake2b(_bytes(code), digest_size=16).hexdigest()


def _bytes(code: types.CodeType) -> bytes:
    """All of a code object: plans name places in it, so its file and lines are among it."""
    about = (
        *(code.co_filename, code.co_qualname, code.co_firstlineno, code.co_flags, code.co_argcount, code.co_posonlyargcount),
        *(code.co_kwonlyargcount, code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars, [*map(_constant, code.co_consts)]),
    )
    return repr(about).encode() + code.co_code + code.co_linetable + code.co_exceptiontable


def _constant(value: Any) -> str:
    if isinstance(value, types.CodeType):
        return _digest(value)
    if isinstance(value, frozenset):
        return f"frozenset{sorted(map(_constant, value))}"
    return f"({','.join(map(_constant, value))})" if isinstance(value, tuple) else f"{type(value).__name__}{value!r}"
