"""Numbers that code reads from tensors: both answers to what it asks of them are traced, also where it makes plain numbers of flags."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.axes.operators.elementwise import pointwise
from autotp.axes.operators.table import OPERATORS, Operator
from autotp.testing import assert_equivalent
from autotp.testing.ranks.threads import ThreadRanks
from autotp.trace.python_mode import PythonMode

X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
READS: dict[str, Callable[[Tensor], Any]] = {
    "if t": lambda t: t,
    "is_nonzero": lambda t: t.is_nonzero(),
    "item": lambda t: t.item() > 0.5,
    "item of more": lambda t: t.item() + 3 > 3.5,
    "tolist": lambda t: t.tolist() == 1,
    "list": lambda t: t.view(1).tolist()[0] > 0.5,
    "float": lambda t: float(t) > 0.5,
    "int": lambda t: int(t) == 1,
    "equal": lambda t: torch.equal(t, torch.ones_like(t)),
    "allclose": lambda t: t.allclose(torch.ones_like(t)),
}


class Flagged(nn.Module):
    """Takes a norm over the hidden width, which is cut, where a number in a buffer says so."""

    def __init__(self, read: str, flag: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.a, self.b, self.read = nn.Linear(12, 16), nn.Linear(16, 12), READS[read]
        self.register_buffer("flag", torch.tensor(flag, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.read(self.flag):
            h = h / (h.norm(dim=-1, keepdim=True) + 1)
        return x + self.b(h.relu())


class Net(nn.Module):
    """Three blocks that are alike but for a number; the middle one has another."""

    def __init__(self, read: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Flagged(read, flag, dtype) for flag in (0.0, 1.0, 0.0)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def _largest_error(make: Callable[[], nn.Module]) -> float:
    """The largest difference of outputs and gradients, before and after the numbers are turned."""
    torch.manual_seed(0)
    model, parallel = make().double(), make().double()
    parallel.load_state_dict(model.state_dict())
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    autotp.parallelize(parallel, mesh, example_inputs={"x": X}, check="graph")
    assert autotp.plan_of(parallel).local_share < 0.6
    errors = []
    for _ in range(2):
        results = []
        for each in (model, parallel):
            x = X.clone().requires_grad_()
            y = each(x)
            (grad,) = torch.autograd.grad(y.square().sum(), x)
            results.append((y.detach(), grad))
            for module in each.modules():
                if isinstance(module, Flagged):
                    module.flag.fill_(1 - float(module.flag))
        errors += [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
    return max(errors)


def _over(makes: tuple[Callable[[], nn.Module], ...]) -> list[float]:
    return [_largest_error(make) for make in makes]


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_numbers_in_buffers_may_be_others(dtype: torch.dtype) -> None:
    makes = tuple(partial(Net, read, dtype) for read in READS)
    ranks = ThreadRanks(2, 120.0, turns=True)
    try:
        found = ranks.run(_over, makes)
    finally:
        ranks.stop()
    assert {name: error < 1e-12 for name, error in zip(READS, found[0], strict=True)} == dict.fromkeys(READS, True)


def test_the_trace_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a number that is taken for a fact leads to another result."""
    monkeypatch.setattr(PythonMode, "_number", lambda self, func, tensor, plain: plain)
    ranks = ThreadRanks(2, 120.0, turns=True)
    try:
        assert min(ranks.run(_over, (partial(Net, "if t", torch.float64), partial(Net, "int", torch.int64)))[0]) > 1e-3
    finally:
        ranks.stop()


class Counts(nn.Module):
    """Reads a number of its own result, and goes another way where it is large; the rest does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        large = h.abs().max().item()
        sizes = {3: 1}.get(h.argmax().item(), 2)  # a place in a dict is not followed
        if large > 0.1:
            h = h.softmax(-1)
        return self.b(h) * sizes + float(large) * 0


def test_numbers_of_activations() -> None:
    assert_equivalent(Counts, tp=2, inputs=X, certificate="graph")


class Compared(nn.Module):
    """Asks of an activation, half of which is always positive, whether all of it is."""

    def __init__(self, compare: str) -> None:
        super().__init__()
        self.a, self.b, self.compare = nn.Linear(12, 16), nn.Linear(16, 12), COMPARES[compare]
        with torch.no_grad():
            self.a.weight[:8], self.a.bias[:8], self.a.bias[8:] = 0, 2, -2

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.b(h if self.compare(h) else h * 2)


COMPARES: dict[str, Callable[[Tensor], bool]] = {
    "equal": lambda h: torch.equal(h, h.abs()),
    "by keywords": lambda h: torch.equal(input=h, other=h.abs()),
    "method": lambda h: h.equal(h.abs()),
    "allclose": lambda h: torch.allclose(h, h.abs()),
}


def _compared(names: tuple[str, ...]) -> list[float]:
    errors = []
    for name in names:
        torch.manual_seed(0)
        model, parallel = Compared(name).double(), Compared(name).double()
        parallel.load_state_dict(model.state_dict())
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        autotp.parallelize(parallel, mesh, example_inputs={"x": X}, check="graph")
        errors += [float((model(x) - parallel(x)).detach().abs().max()) for x in (X, X * 100, X * 0)]
    return errors


def _errors_of(names: tuple[str, ...]) -> list[float]:
    ranks = ThreadRanks(2, 120.0, turns=True)
    try:
        return [max(found) for found in zip(*ranks.run(_compared, names), strict=True)]
    finally:
        ranks.stop()


def test_one_answer_of_all_elements_is_asked_of_whole_values() -> None:
    assert max(_errors_of(tuple(COMPARES))) < 1e-12


def test_an_operator_without_a_result_is_not_elementwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: torch calls `equal` pointwise."""
    monkeypatch.setitem(OPERATORS, "equal", Operator(pointwise))
    assert max(_errors_of(("equal",))) > 1e-3
