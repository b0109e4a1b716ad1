"""Code that torch made: torch.fx, whose name is another on each rank, and torch.jit, which cannot be traced."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.errors import AutoTPError, TraceError
from autotp.testing import assert_equivalent
from tests.support.ranks import Pool, mesh

X = torch.linspace(-1, 1, 2 * 6 * 24, dtype=torch.float64).sin().view(2, 6, 24)


class Gated(nn.Module):
    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(24, 48), nn.Linear(48, 24), nn.LayerNorm(24)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        if self.norm:
            h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.n(self.b(h))  # type: ignore[no-any-return]


class Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + x  # type: ignore[no-any-return]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("norm", [True, False])
def test_modules_of_torch_fx(inside: bool, norm: bool) -> None:
    def make() -> nn.Module:
        traced = torch.fx.symbolic_trace(Gated(norm))
        return Around(traced) if inside else traced

    found = assert_equivalent(make, tp=2, inputs={"x": X}, certificate="graph")
    assert (found.plan.local_share < 0.6) is not norm


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m, X.float())], ids=["script", "trace"])
@pytest.mark.filterwarnings("ignore")
def test_modules_of_torch_jit(make: Callable[[nn.Module], nn.Module]) -> None:
    for model, path in ((make(Gated(False)), "the model"), (Around(make(Gated(False))), "inner")):
        with pytest.raises(TraceError, match=f"{path} is made by torch.jit"):
            autotp.plan(model, tp=2, example_inputs={"x": X.float()})


def lost(path: str) -> str:
    model = Gated(False).double()
    autotp.parallelize(model, mesh(), example_inputs={"x": X}, check="graph")
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    value = getattr(module, name).detach()
    delattr(module, name)
    module.register_buffer(name, value)
    try:
        model(X)
    except AutoTPError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("path", ["a.weight", "a.bias", "b.bias", "n.weight"])
def test_a_parameter_that_is_gone(pool: Pool, path: str) -> None:
    assert all("has lost its" in text for text in pool.run(lost, path))
