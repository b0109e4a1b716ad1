"""A value leaves a call in many ways; whoever finds it finds it whole, and its gradient is that of one device."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.testing.ranks.run import run
from autotp.testing.tiny.models import randomise

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@dataclass
class Output:
    """As many libraries return it."""

    y: Tensor
    inner: Any = None


@dataclass(frozen=True)
class Input:
    x: Tensor


class Attributes(dict[str, Any]):
    """A dict whose keys are attributes too."""

    __getattr__ = dict.__getitem__


class Leaving(nn.Module):
    """Two Linears; `how(self, y, h)` says what becomes of the value between them."""

    kept: Any = None

    def __init__(self, how: Callable[[Any, Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(16, 32), nn.Linear(32, 16), how

    def forward(self, x: Any) -> Any:
        h = torch.relu(self.a(x.x if isinstance(x, Input) else x))
        return self.how(self, self.b(h), h)


class ByHook(nn.Module):
    """A hook that was there before puts what it sees into a list."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)
        found: list[Tensor] = []
        self.found = lambda: found[-1]
        if before:
            self.b.register_forward_pre_hook(lambda m, args: found.append(args[0].square().mean()))
        else:
            self.a.register_forward_hook(lambda m, args, y: found.append(y))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


def _object(**fields: Any) -> Any:
    return SimpleNamespace(**fields)


def _on_tensor(_: Any, y: Tensor, h: Tensor) -> Tensor:
    y.inner = h  # type: ignore[attr-defined]
    return y


def _on_class(_: Any, y: Tensor, h: Tensor) -> Tensor:
    Leaving.kept = h
    return y


def _in_closure(model: Any, y: Tensor, h: Tensor) -> Tensor:
    model.later = lambda: h
    return y


#: name → (what the forward does, how its user finds the value)
WAYS: dict[str, tuple[Callable[..., Any], Callable[[Any, Any], Tensor]]] = {
    "dataclass": (lambda m, y, h: Output(y, h), lambda m, out: out.inner),
    "dataclasses inside": (lambda m, y, h: [Output(y, {"h": Output(h)})], lambda m, out: out[0].inner["h"].y),
    "namespace": (lambda m, y, h: _object(y=y, inner=h), lambda m, out: out.inner),
    "subclass of dict": (lambda m, y, h: Attributes(y=y, inner=h), lambda m, out: out.inner),
    "values of a dict": (lambda m, y, h: {"h": h, "y": y}.values(), lambda m, out: next(iter(out))),
    "deque": (lambda m, y, h: (y, deque([h])), lambda m, out: out[1][0]),
    "attribute of the result": (_on_tensor, lambda m, out: out.inner),
    "attribute of the class": (_on_class, lambda m, out: m.kept),
    "closure on the model": (_in_closure, lambda m, out: m.later()),
}


def compare(factory: Callable[[], nn.Module], find: Callable[[Any, Any], Tensor], inputs: Any) -> autotp.Plan:
    torch.manual_seed(0)
    plain = factory().double()
    randomise(plain, seed=3)

    def use(model: nn.Module, grads: Callable[[nn.Module], Any]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        x = X.clone().requires_grad_()
        found = find(model, model(inputs(x)))
        found.sin().sum().backward()
        made = {"found": found.detach(), "x": x.grad} | {n: g.clone() for n, g in grads(model).items() if g is not None}
        return {n: t for n, t in made.items() if t is not None}

    fresh = copy.deepcopy(plain)
    wanted = use(plain, lambda m: {n: p.grad for n, p in m.named_parameters()})

    def rank(_: object) -> Any:
        model = copy.deepcopy(fresh)
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        autotp.parallelize(model, mesh, example_inputs={"x": inputs(X)}, check="graph")
        return use(model, autotp.full_grads), autotp.plan_of(model)

    for got, _ in (ranks := run("local", rank, None, 2, 120.0)):
        assert got.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert got[name].shape == tensor.shape and float((got[name] - tensor).abs().max()) < 1e-9, name
    plan: autotp.Plan = ranks[0][1]
    return plan


@pytest.mark.parametrize("way", WAYS)
def test_it_is_whole(way: str) -> None:
    how, find = WAYS[way]
    compare(lambda: Leaving(how), find, lambda x: x)


@pytest.mark.parametrize("way", ["dataclass", "subclass of dict"])
def test_a_result_beside_it_is_no_reason_to_stay_whole(way: str) -> None:
    plan = compare(lambda: Leaving(WAYS[way][0]), lambda m, out: out.y, lambda x: x)
    assert plan.local_share < 0.6


@pytest.mark.parametrize("before", [False, True])
def test_hooks_that_were_there_find_it_whole(before: bool) -> None:
    compare(lambda: ByHook(before), lambda m, out: m.found() + 0 * out.sum(), lambda x: x)


def test_inputs_in_a_dataclass() -> None:
    plan = compare(lambda: Leaving(lambda m, y, h: Output(y)), lambda m, out: out.y, Input)
    assert plan.local_share < 0.6
