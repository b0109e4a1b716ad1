"""Settings that code on parts reads, wherever they are: a change is an error that names it, and so is a change back to nothing."""

from __future__ import annotations

import copy
import enum
import functools
import logging
import re
from array import array
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from decimal import Decimal
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.errors import AutoTPError, ChangedError
from autotp.rewrite import entry
from autotp.rewrite.guards.functions import kept_by
from autotp.rewrite.guards.structure import Structure
from autotp.rewrite.guards.values import Values
from autotp.rewrite.guards.watchers import Kept
from autotp.testing.ranks.run import run
from autotp.testing.tiny.models import randomise
from tests.support.ranks import Pool, mesh

X = torch.randn(2, 3, 16, dtype=torch.float64)


class Slots:
    """Settings without a `__dict__`."""

    __slots__ = ("mixed",)

    def __init__(self) -> None:
        self.mixed = False


class Reads(nn.Module):
    """Centres what is between two Linears if `asks(self)` says so."""

    mixed = False

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)
        self.calls: list[int] = []
        for name, value in settings.items():
            setattr(self, name, value)

    def asks(self) -> Any:
        return False

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        self.calls.append(len(self.calls))
        if self.asks():
            h = h - h.mean(-1, keepdim=True)
        return self.b(h)


class InDict(Reads):
    def asks(self) -> Any:
        return self.options["mixed"]


class InObject(Reads):
    def asks(self) -> Any:
        return self.options.inner["mixed"]


class InSet(Reads):
    def asks(self) -> Any:
        return "mixed" in self.options


class InSlots(Reads):
    def asks(self) -> Any:
        return self.options.mixed


class OfClass(Reads):
    def asks(self) -> Any:
        return self.mixed


class ByGetattr(Reads):
    def asks(self) -> Any:
        return getattr(self, "extra", False)


class ByHasattr(Reads):
    def asks(self) -> Any:
        return hasattr(self, "extra")


class Partly(Reads):
    def asks(self) -> Any:
        return self.options()


class Nested(Reads):
    def asks(self) -> Any:
        return self.options.inner.mixed


class ByMethod(Reads):
    def asks(self) -> Any:
        return self.options.on()


def enclosing() -> Any:
    """A model of a class that reads a variable of the function which makes it."""
    mixed = False

    class Encloses(Reads):
        def asks(self) -> bool:
            return mixed

        def mix(self) -> None:
            nonlocal mixed
            mixed = True

    return Encloses()


def enclosed(value: Any) -> Any:
    """A function with a variable of its own."""

    def answer() -> Any:
        return value

    return answer


def enclosed_twice() -> Any:
    inner = enclosed(False)
    return lambda: inner()


def defaulted() -> Any:
    """A function with a default."""

    def answer(mixed: bool = False) -> bool:
        return mixed

    return answer


def property_of() -> Any:
    """A model of a class whose property reads a variable of the function which makes it."""
    mixed = False

    class OfProperty(Reads):
        @property
        def answer(self) -> bool:
            return mixed

        def asks(self) -> bool:
            return self.answer

        def mix(self) -> None:
            nonlocal mixed
            mixed = True

    return OfProperty()


def above_zero(share: float) -> Any:
    def answer() -> bool:
        return share > 0

    return answer


def within(act: Any) -> Any:
    def apply(h: Tensor) -> Tensor:
        return act(h)  # type: ignore[no-any-return]

    return apply


class ByFirst(Reads):
    def asks(self) -> Any:
        return self.options[0]()


class Within(Reads):
    """Calls a function of its own between its Linears."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.function(self.a(x)))  # type: ignore[no-any-return]


def put_into(function: Any, value: Any) -> None:
    function.__closure__[0].cell_contents = value


class Switch:
    """Settings that are asked by a method, a property, or a call."""

    def __init__(self) -> None:
        self.mixed = False

    def on(self) -> bool:
        return self.also

    @property
    def also(self) -> bool:
        return self.mixed

    def __call__(self) -> bool:
        return self.also


class OfSettingsByGetattr(Reads):
    def asks(self) -> Any:
        return getattr(self.options, "extra", False) or self.options.also_extra()


class Extra:
    """Settings that ask for one that is not there, and that note by themselves how often they are asked."""

    def also_extra(self) -> bool:
        setattr(self, "asked", getattr(self, "asked", 0) + 1)  # noqa: B010  # by name
        return hasattr(self, "another")


class OfLength(Reads):
    def asks(self) -> Any:
        return len(self.options) > 1


class ByVariable(Reads):
    share = 0.0

    def asks(self) -> Any:
        share = self.share
        other = 1
        return other if share > 0 else 0


class ByProperty(Reads):
    share = 0.0

    @property
    def kept(self) -> float:
        return self.share

    def asks(self) -> Any:
        return self.kept > 0


class Caches(Reads):
    """Keeps what it made for a width, and what it was asked first."""

    def __init__(self) -> None:
        super().__init__(options={})

    @functools.lru_cache  # noqa: B019  # as models have it
    def made(self, width: int) -> float:
        return float(width)

    def asks(self) -> Any:
        if getattr(self, "first", None) is None:
            setattr(self, "first", 1)  # noqa: B010  # by name
        key = self.a.in_features, dist.is_initialized()  # nothing is kept before the model is made parallel
        if key not in self.options:
            self.options[key] = self.made(key[0])
        return self.options[key] != key[0]


class Logs(Reads):
    def asks(self) -> Any:
        self.options.debug("asked")
        return False


def _quieter(model: Any) -> None:
    """Sets another level, which clears what a logger keeps for itself."""
    model.options.setLevel(logging.ERROR)
    logging.getLogger("autotp.tests.model").addHandler(logging.NullHandler())


class ByDict(Reads):
    def asks(self) -> Any:
        return self.__dict__.get("extra", False)


class ByTry(Reads):
    def asks(self) -> Any:
        try:
            return self.extra
        except AttributeError:
            return False


class OfChild(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.children_ = nn.ModuleList([nn.Identity()])
        self.first = nn.Identity()
        self.first.mixed = False

    def asks(self) -> Any:
        return self.first.mixed or any(getattr(c, "mixed", False) for c in self.children_)


class ByFloat(Reads):
    alpha = 0.0

    def asks(self) -> Any:
        return self.share > 0


class ByClassFloat(Reads):
    share = 0.0

    def asks(self) -> Any:
        return self.share > 0


class Kind(enum.Enum):
    PLAIN = 0
    MIXED = 1


class ByMember(Reads):
    def asks(self) -> Any:
        return self.options is Kind.MIXED


class Notes(nn.Module):
    """Stores in itself what is a flag elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        self.mixed = True
        return x


class StoredElsewhere(OfClass):
    def __init__(self) -> None:
        super().__init__(mixed=False)
        self.notes = Notes()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.notes(x))


class InCounted(InDict):
    def asks(self) -> Any:
        self.options["calls"] += 1
        return super().asks()


class InList(Reads):
    def asks(self) -> Any:
        return any(o.mixed for o in self.options)


class OfSettings:
    mixed = False


class Mixed(OfSettings):
    mixed = True


class Scaled(Reads):
    """A float that no condition is about may change."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * self.share)


class MayBe(Reads):
    """A parameter and a buffer that may be None, and a number that may be a tensor."""

    def __init__(self) -> None:
        super().__init__(gain=1.0)
        self.register_parameter("scale", None)
        self.register_buffer("shift", None)
        self.register_buffer("bound", torch.ones(1))
        self.row = nn.Conv1d(16, 16, 1, bias=False)
        self.wide = nn.Conv1d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x) * self.gain * self.bound
        if self.scale is not None:
            h = h.softmax(-1)
        if self.shift is not None:
            h = h - h.mean(-1, keepdim=True)
        x = self.b(h).transpose(1, 2)
        return self.row(torch.tanh(self.wide(x))).transpose(1, 2)


class Heads(Reads):
    """A number that is local on each rank."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).unflatten(-1, (self.heads, 4)).softmax(-1).flatten(-2))


class Listed(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.ModuleList([nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for act in self.acts:
            h = act(h)
        return self.b(h)


class Differs(Reads):
    """Asks whether a setting of any kind is another one."""

    def __init__(self, options: Any) -> None:
        super().__init__(options=options, first=copy.copy(options))

    def asks(self) -> Any:
        return self.options != self.first


class ByOneOfItsMethods(Reads):
    """Calls a method that is a setting."""

    def __init__(self) -> None:
        super().__init__()
        self.options = self.plainly
        self.within = (functools.partial(self.plainly), [self.plainly])

    def plainly(self) -> bool:
        return False

    def other(self) -> bool:
        return True

    def asks(self) -> Any:
        return self.options() or self.within[0]() or self.within[1][0]()


class ByName(ByOneOfItsMethods):
    """Calls a method by a name that is a setting."""

    kind = "plainly"

    def asks(self) -> Any:
        return getattr(self, f"{self.kind[:5]}ly")()


class ByNameOfFlag(Reads):
    def __init__(self) -> None:
        super().__init__(kind="answer", answer=False)

    def asks(self) -> Any:
        return getattr(self, self.kind)


class Base(Reads):
    """Has what classes below call or hide."""

    def step(self) -> bool:
        return False


def patched() -> Any:
    """A model of a class of its own, with methods of each kind, on which nothing depends but its code."""

    class Patched(Base):
        kept = bool

        def step(self) -> bool:
            return super().step()

        @property
        def also(self) -> bool:
            return False

        @staticmethod
        def still() -> bool:
            return False

        @classmethod
        def of_class(cls) -> bool:
            return False

        def asks(self) -> Any:
            return self.step() or self.also or self.still() or self.of_class() or self.kept()

        def unread(self) -> bool:
            return False

    return Patched()


def patched_below() -> Any:
    """One whose base has its own class."""

    class Root(Reads):
        def step(self) -> bool:
            return False

    class Below(Root):
        def step(self) -> bool:
            return super().step()

        def asks(self) -> Any:
            return self.step()

    return Below()


def patched_settings() -> Any:
    """One whose settings have a class of their own."""

    class Own(Switch):
        pass

    return ByMethod(options=Own())


def in_class(name: str, value: Any, above: int = 0) -> Callable[[Any], Any]:
    """Puts `value` into the class in which `name` is found; `above`: into that of how many bases further."""

    def change(model: Any) -> None:
        setattr([c for c in type(model).__mro__ if name in vars(c)][above], name, value)

    return change


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixed, self.options, self.calls = False, Switch(), 0

    def step(self) -> bool:
        self.steps = self.calls = getattr(self, "steps", 0) + 1
        return self.mixed or self.options.on()

    def forward(self, x: Tensor) -> Tensor:
        return x * min(self.calls, 1)


class Outer(nn.Module):
    """Has methods that code of the module above calls, and a module with such methods; it has no forward."""

    kept = False

    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def step(self) -> bool:
        return self.inner.step() or getattr(self, "extra", False)

    @property
    def also(self) -> bool:
        return self.kept


class CallsMethods(Reads):
    """Calls methods of modules in it, rather than the modules."""

    def __init__(self) -> None:
        super().__init__()
        self.outer, self.rest, self.inner = Outer(), nn.ModuleList([Inner()]), Inner()

    def asks(self) -> Any:
        return self.outer.step() or self.outer.also or self.rest[0].step() or self.inner.step()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.inner(self.a(x)).mean() * 0


def inner_patched() -> Any:
    """A model with a module of a class of its own."""

    class Own(Inner):
        pass

    model = CallsMethods()
    model.inner = Own()
    return model


def in_class_of_inner(model: Any) -> None:
    type(model.inner).step = lambda self: True


def in_class_of_settings(model: Any) -> None:
    type(model.options).on = lambda self: True


class Idle(Reads):
    """Has a module that it never calls, and asks for its class or for what it holds."""

    def __init__(self, by: str) -> None:
        super().__init__(by=by)
        self.extra, self.rest = nn.Identity(), nn.ModuleList([nn.Identity()])

    def asks(self) -> Any:
        if self.by == "class":
            return not isinstance(self.extra, nn.Identity)
        return next(self.rest.parameters(), None) is not None if self.by == "list" else getattr(self.extra, "bias", None) is not None


class AsksOfWhole(Reads):
    """Asks for the class of a module whose argument and result are whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(self.first(x))
        return self.b(h.softmax(-1) if self.first.__class__ is nn.Sigmoid else h)


class Fills(Reads):
    """Writes into arrays of its own."""

    def __init__(self) -> None:
        super().__init__(seen=bytearray(1), counted=array("l", [0]))

    def asks(self) -> Any:
        self.seen[0] += 1
        self.counted[0] += 1
        return self.seen[0] == 0 and self.counted[0] == 0


class Draws(Reads):
    """Has a source of random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x))) if self.source is not None else x


class Odd:
    """Cannot be compared."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = None  # type: ignore[assignment]


def _set(value: Any) -> Callable[[Any], Any]:
    return lambda m: setattr(m, "options", value)


#: Settings of kinds that hold no values of their own, and others of their kind.
KINDS: dict[str, tuple[Any, Any]] = {
    "a slice": (slice(0, 1), slice(0, 2)),
    "slices": ((slice(0, 1), ...), (slice(0, 2), ...)),
    "a device": (torch.device("cpu"), torch.device("meta")),
    "a format": (torch.contiguous_format, torch.channels_last),
    "a dtype of numpy": (np.dtype("f4"), np.dtype("f8")),
    "a decimal": (Decimal(0), Decimal(1)),
    "a pattern": (re.compile("a"), re.compile("b")),
    "patterns": ([re.compile("a")], [re.compile("b")]),
    "bytes": (bytearray(b"a"), bytearray(b"b")),
    "numbers": (array("i", [0]), array("i", [1])),
    "an item": (itemgetter(0), itemgetter(1)),
    "a date": (date(2020, 1, 1), date(2021, 1, 1)),
    "a time": (timedelta(1), timedelta(2)),
    "an ellipsis": (..., None),
    "a method of torch": (torch.Tensor.relu, torch.Tensor.tanh),
    "a method of int": (int.__add__, int.__sub__),
    "a class with a metaclass": (Mapping, Sequence),
    "a number, then numbers": (0, np.arange(2)),
    "a number, then a tensor": (0, torch.arange(2)),
    "a number, then what cannot be compared": (0, Odd()),
}

CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "a dict": (lambda: InDict(options={"mixed": False}), lambda m: m.options.update(mixed=True), "options was"),
    "a dict of an object": (
        lambda: InObject(options=SimpleNamespace(inner={"mixed": 0})),
        lambda m: m.options.inner.update(mixed=1),
        "options.inner was",
    ),
    "a flag beside a float": (
        lambda: InDict(options={"mixed": False, "eps": 1e-5}),
        lambda m: m.options.update(mixed=True),
        "options was",
    ),
    "an ordered dict": (lambda: InDict(options=OrderedDict(mixed=False)), lambda m: m.options.update(mixed=True), "options was"),
    "a member of an enumeration": (
        lambda: ByMember(options=Kind.PLAIN),
        lambda m: setattr(m, "options", Kind.MIXED),
        "options was <Kind.PLAIN",
    ),
    "a flag that another class stores in itself": (StoredElsewhere, lambda m: setattr(m, "mixed", True), "mixed was False"),
    "a float of the class that a condition is about": (ByClassFloat, lambda m: setattr(m, "share", 0.5), "share was 0.0"),
    "a flag beside a counter": (
        lambda: InCounted(options={"mixed": False, "calls": 0}),
        lambda m: m.options.update(mixed=True),
        "options was {'mixed': False}",
    ),
    "a default of a dict": (
        lambda: InDict(options=defaultdict(bool)),
        lambda m: m.options.update(mixed=True),
        "options was {'mixed': False}",
    ),
    "a flag beside a tensor": (
        lambda: InDict(options={"mixed": False, "scale": torch.ones(3)}),
        lambda m: m.options.update(mixed=True),
        "options was a dict (mixed: False",
    ),
    "objects in a list": (
        lambda: InList(options=[SimpleNamespace(mixed=False)]),
        lambda m: setattr(m.options[0], "mixed", True),
        "options was a list (a SimpleNamespace (mixed: False))",
    ),
    "a deque": (lambda: InSet(options=deque(["plain"])), lambda m: m.options.append("mixed"), "options was a list ('plain')"),
    "a method of an object": (lambda: Partly(options=Switch().on), lambda m: setattr(m.options.__self__, "mixed", True), "options was"),
    "a setting that is asked for": (
        lambda: OfSettingsByGetattr(options=Extra()),
        lambda m: setattr(m.options, "extra", True),
        "options.extra was not there",
    ),
    "a setting that a method of theirs asks for": (
        lambda: OfSettingsByGetattr(options=Extra()),
        lambda m: setattr(m.options, "another", True),
        "options.another was not there",
    ),
    "a method of settings that an attribute hides": (
        lambda: ByMethod(options=Switch()),
        lambda m: setattr(m.options, "on", lambda: True),
        "options.on was not there",
    ),
    "an array of another length": (
        lambda: OfLength(options=np.zeros(1)),
        lambda m: setattr(m, "options", np.zeros(2)),
        "options was an array of shape (1,)",
    ),
    "an empty deque": (lambda: InSet(options=deque()), lambda m: m.options.append("mixed"), "options was a list ()"),
    "a float in a variable": (ByVariable, lambda m: setattr(m, "share", 0.5), "share was 0.0"),
    "a float behind a property": (ByProperty, lambda m: setattr(m, "share", 0.5), "share was 0.0"),
    "a class made of its own": (
        OfClass,
        lambda m: setattr(m, "__class__", type("Sub", (type(m),), {"asks": lambda self: True})),
        "the model was a OfClass when the model was made parallel, is a Sub now",
    ),
    "an item that a forward made": (
        Caches,
        lambda m: m.options.update({(16, True): 0.0}),
        "options was {(16, False): 16.0, (16, True): 16.0}",
    ),
    "a class": (lambda: InSlots(options=OfSettings), lambda m: setattr(m, "options", Mixed), "options was"),
    "a method of its own": (Reads, lambda m: setattr(m, "asks", lambda: True), "asks was not there"),
    "a set": (lambda: InSet(options=set()), lambda m: m.options.add("mixed"), "options was"),
    "slots": (lambda: InSlots(options=Slots()), lambda m: setattr(m.options, "mixed", True), "options.mixed was False"),
    "a default of the class": (OfClass, lambda m: setattr(m, "mixed", True), "mixed was False"),
    "getattr": (ByGetattr, lambda m: setattr(m, "extra", True), "extra was not there"),
    "hasattr": (ByHasattr, lambda m: setattr(m, "extra", 1), "extra was not there"),
    "a partial function": (
        lambda: Partly(options=functools.partial(bool, 0)),
        lambda m: setattr(m, "options", functools.partial(bool, 1)),
        "options was",
    ),
    "settings in settings": (
        lambda: Nested(options=SimpleNamespace(inner=SimpleNamespace(mixed=False))),
        lambda m: setattr(m.options.inner, "mixed", True),
        "options.inner.mixed was False",
    ),
    "other settings": (
        lambda: InSlots(options=SimpleNamespace(mixed=False)),
        lambda m: setattr(m, "options", SimpleNamespace(mixed=True)),
        "options, which code on a rank's part reads, is another object",
    ),
    "other settings in settings": (
        lambda: Nested(options=SimpleNamespace(inner=SimpleNamespace(mixed=False))),
        lambda m: setattr(m.options, "inner", SimpleNamespace(mixed=True)),
        "options.inner, which code on a rank's part reads, is another object",
    ),
    "a method of settings": (lambda: ByMethod(options=Switch()), lambda m: setattr(m.options, "mixed", True), "options.also was False"),
    "settings that are called": (lambda: Partly(options=Switch()), lambda m: setattr(m.options, "mixed", True), "options.also was False"),
    "keywords of a partial function": (
        lambda: Partly(options=functools.partial(dict, mixed=False)),
        lambda m: m.options.keywords.clear(),
        "options.keywords was {'mixed': False}",
    ),
    "__dict__": (ByDict, lambda m: setattr(m, "extra", True), "extra was not there"),
    "an AttributeError": (ByTry, lambda m: setattr(m, "extra", True), "extra was not there"),
    "of a child": (OfChild, lambda m: setattr(m.first, "mixed", True), "first.mixed was False"),
    "of a child in a list": (OfChild, lambda m: setattr(m.children_[0], "mixed", True), "children_.0.mixed was not there"),
    "a float that a condition is about": (lambda: ByFloat(share=0.0), lambda m: setattr(m, "share", 0.5), "share was 0.0"),
    "a parameter that was None": (MayBe, lambda m: setattr(m, "scale", nn.Parameter(torch.ones(()))), "scale was None"),
    "a buffer that was None": (MayBe, lambda m: setattr(m, "shift", torch.ones(())), "shift was None"),
    "a tensor where a number was": (MayBe, lambda m: setattr(m, "gain", torch.ones(32).double()), "gain was a number"),
    "a buffer that grows": (MayBe, lambda m: setattr(m, "bound", torch.ones(32).double()), "bound was a tensor of shape (1,)"),
    "a bias of a Linear": (
        lambda: _without_bias(Reads()),
        lambda m: setattr(m.b, "bias", nn.Parameter(torch.ones(16).double())),
        "b.bias was None",
    ),
    "a bias of a convolution": (
        MayBe,
        lambda m: setattr(m.row, "bias", nn.Parameter(torch.ones(16).double())),
        "row.bias was None",
    ),
    "a variable around its class": (enclosing, lambda m: m.mix(), "mixed, a variable around Encloses.asks"),
    "a variable around a function": (
        lambda: Partly(options=enclosed(False)),
        lambda m: put_into(m.options, True),
        "value, a variable around answer",
    ),
    "a variable behind a partial function": (
        lambda: Partly(options=functools.partial(enclosed(False))),
        lambda m: put_into(m.options.func, True),
        "value, a variable around answer",
    ),
    "a variable around a function around it": (
        lambda: Partly(options=enclosed_twice()),
        lambda m: put_into(m.options.__closure__[0].cell_contents, True),
        "value, a variable around answer",
    ),
    "a variable around a property": (property_of, lambda m: m.mix(), "mixed, a variable around OfProperty.answer"),
    "a float around a function that a condition is about": (
        lambda: Partly(options=above_zero(0.0)),
        lambda m: put_into(m.options, 1.0),
        "share, a variable around answer",
    ),
    "a variable around a function in a list": (
        lambda: ByFirst(options=[enclosed(False)]),
        lambda m: put_into(m.options[0], True),
        "value, a variable around answer",
    ),
    "a module around a function": (
        lambda: Within(within(nn.ReLU())),
        lambda m: put_into(m.function, nn.Softmax(-1)),
        "act, a variable around apply",
    ),
    "a default of an argument": (
        lambda: Partly(options=defaulted()),
        lambda m: setattr(m.options, "__defaults__", (True,)),
        "a default of answer",
    ),
    **{name: (functools.partial(Differs, options), _set(other), "options was") for name, (options, other) in KINDS.items()},
    "bytes that are written to": (lambda: Differs(bytearray(b"a")), lambda m: m.options.__setitem__(0, 0), "options was bytearray(b'a')"),
    "numbers that are written to": (lambda: Differs(array("i", [0])), lambda m: m.options.append(1), "options was array('i', [0])"),
    "a method that is a setting": (
        ByOneOfItsMethods,
        lambda m: setattr(m, "options", m.other),
        "options was the method ByOneOfItsMethods.plainly",
    ),
    "a method in a partial function": (
        ByOneOfItsMethods,
        lambda m: setattr(m, "within", (m.other, m.within[1])),
        "within was (functools.par",
    ),
    "a method in a list": (ByOneOfItsMethods, lambda m: m.within[1].__setitem__(0, m.other), "within was"),
    "a method by a name that is a setting": (ByName, lambda m: setattr(m, "plainly", lambda: True), "plainly was not there"),
    "a flag by a name that is a setting": (ByNameOfFlag, lambda m: setattr(m, "answer", True), "answer was False"),
    "the class of settings": (
        lambda: ByMethod(options=Switch()),
        lambda m: setattr(m.options, "__class__", type("Other", (Switch,), {"on": lambda self: True})),
        "options.__class__ was <class",
    ),
    "a method of its class": (patched, in_class("asks", lambda self: True), "Patched.asks was the function"),
    "a property of its class": (patched, in_class("also", property(lambda self: True)), "Patched.also was <property"),
    "a static method of its class": (patched, in_class("still", staticmethod(lambda: True)), "Patched.still was the function"),
    "a class method of its class": (patched, in_class("of_class", classmethod(lambda cls: True)), "Patched.of_class was <bound method"),
    "a method that a method below calls": (patched_below, in_class("step", lambda self: True, above=1), "Root.step was the function"),
    "a method of the class of settings": (patched_settings, in_class_of_settings, "Own.on was the function"),
    "a method of a module in it": (CallsMethods, lambda m: setattr(m.inner, "step", lambda: True), "inner.step was not there"),
    "a method of a module in a list": (CallsMethods, lambda m: setattr(m.rest[0], "step", lambda: True), "rest.0.step was not there"),
    "a method of a module in a module": (
        CallsMethods,
        lambda m: setattr(m.outer.inner, "step", lambda: True),
        "outer.inner.step was not there",
    ),
    "a method of the class of a module": (inner_patched, in_class_of_inner, "step was the function"),
    "a flag that such a method reads": (CallsMethods, lambda m: setattr(m.inner, "mixed", True), "inner.mixed was False"),
    "a flag that such a method of a module in a module reads": (
        CallsMethods,
        lambda m: setattr(m.outer.inner, "mixed", True),
        "outer.inner.mixed was False",
    ),
    "settings that such a method reads": (CallsMethods, lambda m: setattr(m.rest[0].options, "mixed", True), "rest.0.options.also was"),
    "what such a method asks for": (CallsMethods, lambda m: setattr(m.outer, "extra", True), "outer.extra was not there"),
    "what a property of such a module reads": (CallsMethods, lambda m: setattr(m.outer, "kept", True), "outer.kept was False"),
    "another module with such methods": (
        CallsMethods,
        lambda m: setattr(m, "outer", Outer()),
        "outer was a Outer when the model was made parallel, is another Outer now, and no call that was traced ran it",
    ),
    "a class where its class has one": (patched, lambda m: setattr(m, "kept", lambda: True), "kept was <class 'bool'>"),
    "another module for one that no call ran": (
        lambda: Idle("class"),
        lambda m: setattr(m, "extra", nn.Tanh()),
        "extra was a Identity when the model was made parallel, is a Tanh now, and the code of the model, which runs",
    ),
    "a module with more for one that no call ran": (
        lambda: Idle("bias"),
        lambda m: setattr(m, "extra", nn.Linear(2, 2)),
        "is a Linear now, and the code of the model",
    ),
    "a module in a list for one that no call ran": (
        lambda: Idle("list"),
        lambda m: m.rest.__setitem__(0, nn.Linear(2, 2)),
        "rest.0 was a Identity when the model was made parallel, is a Linear now, and no call",
    ),
    "another module whose class is asked for": (
        AsksOfWhole,
        lambda m: setattr(m, "first", nn.Sigmoid()),
        "first was a Tanh when the model was made parallel, is a Sigmoid now, and the code of the model",
    ),
    "a list of modules": (Listed, lambda m: m.acts.append(nn.Softmax(-1)), "acts.1, a Softmax, was added"),
}


def _without_bias(model: Any) -> Any:
    model.b.bias = None
    return model


#: What may change: the result is that of one device.
HARMLESS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "a float that no condition is about": (lambda: Scaled(share=0.5), lambda m: setattr(m, "share", 0.25)),
    "a number for a number": (MayBe, lambda m: setattr(m, "gain", 2.0)),
    "a tensor of one entry for a number": (MayBe, lambda m: setattr(m, "gain", torch.tensor(2.0).double())),
    "a buffer of its shape": (MayBe, lambda m: setattr(m, "bound", torch.full((1,), 3.0).double())),
    "the model's own value of a local number": (lambda: Heads(heads=8), lambda m: setattr(m, "heads", 8)),
    "a float of numpy that is no number": (
        lambda: Partly(options=enclosed(np.float64("nan") * 0)),
        lambda m: put_into(m.options, np.float64("nan")),
    ),
    "a variable that no path depends on": (lambda: Partly(options=enclosed(0.0)), lambda m: put_into(m.options, -0.0)),
    "an equal slice": (lambda: Differs(slice(0, 1)), lambda m: setattr(m, "options", slice(0, 1))),
    "equal bytes": (lambda: Differs(bytearray(b"a")), lambda m: setattr(m, "options", bytearray(b"a"))),
    "the same method": (ByOneOfItsMethods, lambda m: setattr(m, "options", m.plainly)),
    "what a forward wrote": (Fills, lambda m: m.seen.__setitem__(0, 7)),
    "another source of random numbers": (
        lambda: Draws(source=torch.Generator()),
        lambda m: setattr(m, "source", torch.Generator().manual_seed(1)),
    ),
    "a method that no code reads": (patched, lambda m: (in_class("unread", lambda self: True)(m), setattr(m, "unread", lambda: True))),
    "a method of a module in it that no code calls": (CallsMethods, lambda m: setattr(m.inner, "other", lambda: True)),
    "another module of whole values": (AsksOfWhole, lambda m: setattr(m, "first", nn.Tanh())),
    "a class made of its own, with the same methods": (OfClass, lambda m: setattr(m, "__class__", type("Sub", (type(m),), {"more": 1}))),
    "caches that are cleared": (Caches, lambda m: (m.options.pop((16, True), None), m.made.cache_clear())),
    "a logger": (lambda: Logs(options=logging.getLogger("autotp.tests.model")), _quieter),
    "a logger with more to say": (lambda: Logs(options=logging.LoggerAdapter(logging.getLogger("autotp.tests.model"))), _quieter),
    "what settings note themselves": (lambda: OfSettingsByGetattr(options=Extra()), lambda m: setattr(m.options, "asked", 0)),
    "what no code reads": (Reads, lambda m: setattr(m, "note", "x")),
}


def said_again(model: Any, said: str) -> str:
    """What a call says after a refused one: a refusal accepts nothing."""
    with pytest.raises(AutoTPError) as again:
        model(X)
    assert str(again.value) == said
    return said


def changed(factory: Callable[[], Any], change: Callable[[Any], Any]) -> tuple[float, str, float]:
    """The difference before the change, what the next call says, and the share that a rank holds."""
    torch.manual_seed(0)
    plain = factory().double()
    randomise(plain, seed=3)
    wanted = plain(X)

    def rank(_: object) -> tuple[float, str, float]:
        model = copy.deepcopy(plain)
        autotp.parallelize(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), example_inputs={"x": X}, check="graph")
        apart = max(float((model(X) - wanted).detach().abs().max()) for _ in range(3))  # what its forward fills is no change
        model.calls.clear()
        model(X)
        dist.barrier()  # ranks are threads, and share functions
        change(model)
        dist.barrier()
        try:
            got = model(X)
        except AutoTPError as error:
            return apart, said_again(model, str(error)), autotp.plan_of(model).local_share
        after = copy.deepcopy(plain)
        change(after)
        return apart, f"differs by {float((after(X) - got).detach().abs().max())}", autotp.plan_of(model).local_share

    return run("local", rank, None, 2, 60.0)[0]


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_an_error(name: str) -> None:
    factory, change, says = CHANGES[name]
    apart, said, share = changed(factory, change)
    assert apart < 1e-9 and share < 0.6
    assert says in said


@pytest.mark.parametrize("name", HARMLESS)
def test_what_may_change(name: str) -> None:
    apart, said, share = changed(*HARMLESS[name])
    assert apart < 1e-9 and share < 0.6
    assert said.startswith("differs by") and float(said.rpartition(" ")[2]) < 1e-9


def test_a_variable_that_a_forward_changes_is_its_own() -> None:
    function = enclosed(1)
    ((called, cell, name, tested),) = kept_by(functools.partial(function))
    assert not tested
    kept = Kept("", called, cell, name)
    values = Values([kept])
    values.check()
    put_into(function, 2)
    with pytest.raises(ChangedError, match=r"value, a variable around answer \(the model\) was 1"):
        values.check()
    values.again()  # had it been a forward that changed it
    values.check()
    put_into(function, 3)
    values.check()


@pytest.mark.parametrize(
    "name",
    [
        *("a dict", "a method that is a setting", "a slice", "a method of its class", "a flag that such a method reads"),
        *("a setting that is asked for", "a method of settings that an attribute hides", "an array of another length"),
        *("a float in a variable", "a float behind a property"),
    ],
)
def test_without_the_guards_it_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(entry, "watched", lambda *_: iter(()))
    _, said, _ = changed(*CHANGES[name][:2])
    assert said.startswith("differs by") and float(said.rpartition(" ")[2]) > 1e-3


@pytest.mark.parametrize("name", ["another module for one that no call ran", "another module whose class is asked for"])
def test_without_a_look_at_the_code_it_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control for modules."""
    monkeypatch.setattr(Structure, "_asks_for", lambda *_: "")
    _, said, _ = changed(*CHANGES[name][:2])
    assert said.startswith("differs by") and float(said.rpartition(" ")[2]) > 1e-3


def _on_processes(name: str) -> str:
    factory, change, _ = CHANGES[name]
    torch.manual_seed(0)
    model = autotp.parallelize(factory().double(), mesh(), example_inputs={"x": X}, check="graph")
    model(X)
    change(model)
    with pytest.raises(ChangedError) as refused:
        model(X)
    return str(refused.value)


@pytest.mark.parametrize("name", ["a method that is a setting", "a property of its class", "another module for one that no call ran"])
def test_on_processes(name: str, pool: Pool) -> None:
    assert all(CHANGES[name][2] in said for said in pool.run(_on_processes, name))
