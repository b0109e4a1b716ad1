"""Settings that code on parts reads, wherever they are: a change is an error that names it, and so is a change back to nothing."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.errors import AutoTPError
from autotp.rewrite import entry
from autotp.testing.ranks.run import run
from autotp.testing.tiny import randomise

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


class Listed(Reads):
    def __init__(self) -> None:
        super().__init__()
        self.acts = nn.ModuleList([nn.Tanh()])

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        for act in self.acts:
            h = act(h)
        return self.b(h)


CHANGES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], str]] = {
    "a dict": (lambda: InDict(options={"mixed": False}), lambda m: m.options.update(mixed=True), "options was"),
    "a dict of an object": (
        lambda: InObject(options=SimpleNamespace(inner={"mixed": 0})),
        lambda m: m.options.inner.update(mixed=1),
        "options.inner was",
    ),
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
    "a list of modules": (Listed, lambda m: m.acts.append(nn.Softmax(-1)), "acts.1, a Softmax, was added"),
}


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
        change(model)
        try:
            got = model(X)
        except AutoTPError as error:
            return apart, str(error), autotp.plan_of(model).local_share
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


def test_without_the_guards_it_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control."""
    monkeypatch.setattr(entry, "watched", lambda *_: iter(()))
    _, said, _ = changed(*CHANGES["a dict"][:2])
    assert said.startswith("differs by") and float(said.rpartition(" ")[2]) > 1e-3
