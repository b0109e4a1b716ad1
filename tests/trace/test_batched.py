"""A vmap over activations: what goes in stays whole, what is around it is cut all the same; what cannot be traced is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.errors import AutoTPError
from autotp.testing import assert_equivalent
from autotp.trace.graph import Pseudo
from tests.support.slow import in_turns

X = torch.randn(3, 5, 8, dtype=torch.float64)


class Around(nn.Module):
    """A function of each row between two linears, then a region."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.before, self.after, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale, self.function, self.inner = nn.Parameter(torch.ones(8)), function, nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.after(self.function(self, self.before(x)))
        return x + self.down(F.gelu(self.up(x)))


def attention(model: Any, h: Tensor) -> Tensor:
    return torch.vmap(lambda t: (t @ t.T).softmax(-1) @ t * model.scale)(h)


def in_parts(model: Any, h: Tensor) -> Tensor:
    return torch.vmap(lambda t: t.cumsum(-1), chunk_size=2)(h)


def of_a_tree(model: Any, h: Tensor) -> Tensor:
    a, b = torch.vmap(lambda t: (t.cumsum(-1), {"mean": t.mean(0)}), out_dims=(1, 0))(h)
    return a.transpose(0, 1) + b["mean"][:, None]


def nested(model: Any, h: Tensor) -> Tensor:
    return torch.vmap(torch.vmap(lambda t: t.softmax(-1) * t))(h)


def of_parameters(model: Any, h: Tensor) -> Tensor:
    return torch.vmap(lambda t: F.linear(t, model.inner.weight, model.inner.bias) + model.inner.weight.t()[0])(h)


def with_a_whole_tensor(model: Any, h: Tensor) -> Tensor:
    return torch.vmap(lambda t, u: t * u.sum(0), in_dims=(0, None))(h, h[0])


@pytest.mark.parametrize(("function", "tp"), in_turns([attention, in_parts, of_a_tree, nested, of_parameters, with_a_whole_tensor], (2, 3)))
def test_what_is_around_is_cut(function: Callable[[nn.Module, Tensor], Tensor], tp: int) -> None:
    found = assert_equivalent(lambda: Around(function), tp=tp, inputs={"x": X}, steps=1)
    assert {"up.weight", "down.weight"} <= found.sharded
    assert "before.weight" not in found.sharded
    assert "vmap" in found.plan.replicated["before.weight"]


def test_what_comes_out_would_be_a_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the node of the vmap its result depends on nothing."""
    from autotp.axes.find import keep
    from autotp.trace.batched import Batches
    from autotp.trace.example import Example
    from autotp.trace.run import trace

    def made() -> tuple[bool, bool]:
        graph = trace(Around(attention).double(), (Example("user", lambda: {"x": X}),), keep)
        after = next(n for n in graph.nodes if n.module == "after" and n.opname == "linear")
        return any(n.op is Pseudo.BATCHED for n in graph.nodes), next(after.inputs()).id in {o.id for n in graph.nodes for o in n.outputs}

    assert made() == (True, True)
    monkeypatch.setattr(Batches, "_made", lambda self, used, result: result)
    assert not made()[0]


def jacobian(model: Any, h: Tensor) -> Tensor:
    return h @ torch.func.jacrev(lambda t: t.softmax(-1))(h[0, 0])  # type: ignore[no-any-return]


def in_place(model: Any, h: Tensor) -> Tensor:
    h = h * 1
    return torch.vmap(lambda t: t.mul_(2.0))(h) + h


def a_module(model: Any, h: Tensor) -> Tensor:
    return torch.vmap(model.inner)(h)


@pytest.mark.parametrize(("function", "why"), [(jacobian, "other than vmap"), (in_place, "writes into"), (a_module, "torch.func")])
def test_what_cannot_be_traced(function: Callable[[nn.Module, Tensor], Tensor], why: str) -> None:
    model = Around(function).double()
    model(X)
    with pytest.raises(AutoTPError, match=why):
        autotp.plan(model, tp=2, example_inputs={"x": X})
