"""Under transforms of torch.func and their like a parallel model is equal to one device, or refuses alike on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autotp
from autotp.errors import AutoTPError
from tests.support.ranks import Pool, mesh


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 10), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(12, 4), nn.LayerNorm(4), nn.Linear(4, 12)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.table(ids)))


def x() -> Tensor:
    return torch.linspace(-1, 1, 8, dtype=torch.float64).view(1, 2, 4)


def ids() -> Tensor:
    return torch.tensor([[1, 7, 11]])


def _batched(of: Callable[[nn.Module, Tensor], Any]) -> Callable[[nn.Module], Any]:
    def run(m: nn.Module) -> Any:
        given = x().requires_grad_()
        return torch.autograd.grad(m(given), of(m, given), torch.eye(8, dtype=torch.float64).view(8, 1, 2, 4), is_grads_batched=True)[0]

    return run


def _frozen(function: Callable[[nn.Module], Any]) -> Callable[[nn.Module], Any]:
    return lambda m: function(m.requires_grad_(False))


def _parameters(m: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in m.named_parameters()}


def _of_parameters(m: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda given: torch.func.functional_call(m, given, (x(),)).pow(2).sum()


def _dual(m: nn.Module) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(m(forward_ad.make_dual(x(), torch.ones_like(x())))).tangent


def _without_gradients(m: nn.Module) -> Any:
    with torch.no_grad():
        return torch.vmap(m)(torch.stack([x(), x() + 1]))


#: Functions of an MLP that are refused.
REFUSED: dict[str, Callable[[Any], Any]] = {
    "jit.trace": lambda m: torch.jit.trace(m, (x(),), check_trace=False),
    "batched": _batched(lambda m, given: given),
    "batched, of a column-parallel weight": _batched(lambda m, given: m.up.weight),
    "batched, of a row-parallel weight": _batched(lambda m, given: m.down.weight),
    "batched, of a bias": _batched(lambda m, given: m.up.bias),
    "vectorized": lambda m: torch.autograd.functional.jacobian(m, x(), vectorize=True),
    "vmap": lambda m: torch.vmap(m)(torch.stack([x(), x() + 1])),
    "vmap without gradients": _without_gradients,
    "vmap of frozen": _frozen(lambda m: torch.vmap(m)(torch.stack([x(), x() + 1]))),
    "vmap of one layer": _frozen(lambda m: torch.vmap(m.down)(m.up(torch.ones(3, 2, 4, dtype=torch.float64)))),
    "grad": lambda m: torch.func.grad(lambda given: m(given).sum())(x()),
    "grad, frozen": _frozen(lambda m: torch.func.grad(lambda given: m(given).sum())(x())),
    "grad of one layer": lambda m: torch.func.grad(lambda given: m.up(given).sum())(x()),
    "jacrev": lambda m: torch.func.jacrev(m)(x()),
    "jacfwd": lambda m: torch.func.jacfwd(m)(x()),
    "jvp": lambda m: torch.func.jvp(m, (x(),), (x(),)),
    "jvp of parameters": lambda m: torch.func.jvp(_of_parameters(m), (_parameters(m),), (_parameters(m),)),
    "grad of parameters": lambda m: torch.func.grad(_of_parameters(m))(_parameters(m)),
    "hessian": lambda m: torch.func.hessian(lambda given: m(given).sum())(x()),
    "dual": _dual,
    "dual, frozen": _frozen(_dual),
}

#: Functions of an MLP that are equal.
EQUAL: dict[str, Callable[[Any], Any]] = {
    "looped": lambda m: torch.autograd.functional.jacobian(m, x()),
    "vjp": lambda m: torch.autograd.functional.vjp(m, x(), torch.ones_like(x()))[1],
    "a batch": lambda m: m(torch.cat([x(), x() + 1])),
    "vmap beside it": lambda m: torch.vmap(torch.sin)(m(x())),
    "grad of a parameter": lambda m: torch.func.grad(lambda w: w.pow(3).sum() + w.amax())(m.up.weight.detach()),
    "vmap over a parameter": lambda m: torch.vmap(lambda i: (m.up.weight.detach() * i).sum())(torch.arange(3.0, dtype=torch.float64)),
}


def _one(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind().double()


def transformed() -> list[str]:
    wrong: list[str] = []
    line = mesh()
    made = {kind: _one(kind) for kind in (MLP, Lookup)}
    for kind, m in made.items():
        autotp.parallelize(m, line, example_inputs={"x": x()} if kind is MLP else {"ids": ids()})
    m, plain = made[MLP], _one(MLP)

    def refuses(name: str, function: Callable[[], Any]) -> None:
        try:
            function()
            wrong.append(f"{name}: not refused")
        except AutoTPError as error:
            # one layer is not called by itself either
            if not any(text in str(error) for text in ("one vector at a time", "outside of a call of the model", "traced by torch.jit")):
                wrong.append(f"{name}: {error}")
        except Exception as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")

    for name, function in REFUSED.items():
        function(_one(MLP))  # one device does it, or there is nothing to refuse
        refuses(name, lambda function=function: function(m))
        m.requires_grad_(True)
    refuses("lookup", lambda: torch.vmap(made[Lookup])(torch.stack([ids(), ids()])))
    refuses(
        "lookup of parameters",
        lambda: torch.func.grad(lambda p: torch.func.functional_call(made[Lookup], p, (ids(),)).sum())(_parameters(made[Lookup])),
    )
    for name, function in EQUAL.items():
        wanted, got = function(plain), function(m)
        got = got.full_tensor() if isinstance(got, DTensor) else got
        if not torch.allclose(wanted, got, rtol=1e-12, atol=1e-12):
            wrong.append(f"{name}: differs")
    return wrong


@pytest.mark.parametrize("world", [2, 3])
def test_transforms_are_refused_alike_or_equal(pool: Pool, world: int) -> None:
    for wrong in pool.run(transformed, world=world):
        assert not wrong, "\n".join(wrong)


def exported() -> list[float]:
    """How far exported programs are off, for inputs that they were not exported with; with gradients they are refused."""
    errors = []
    for kind, given, other in ((MLP, {"x": x()}, {"x": x() + 2}), (Lookup, {"ids": ids()}, {"ids": 11 - ids()})):
        m, plain = _one(kind), _one(kind)
        autotp.parallelize(m, mesh(), example_inputs=given)
        with pytest.raises(AutoTPError, match=r"inside of torch\.no_grad\(\)"):
            torch.export.export(m, (), given)
        with torch.no_grad():
            program = torch.export.export(m, (), given).module()
            errors.append(float((program(**other) - plain(**other)).abs().max()))
    return errors


def test_exported_without_gradients(pool: Pool) -> None:
    for errors in pool.run(exported):
        assert max(errors) < 1e-9
