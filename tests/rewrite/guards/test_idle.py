"""Modules and parameters of no traced call, in code that holds parts, summands or partial gradients: as on one device, or refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.errors import AutoTPError
from autotp.rewrite.guards import idle
from autotp.rewrite.parameters.dtensor_operators import dispatch
from autotp.testing.ranks.run import run
from tests.support.ranks import Pool, mesh

SHORT, LONG = (torch.randn(2, n, 8, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (4, 6))
EXAMPLES = "Pass example_inputs of such a call"


def mlp(width: int = 16) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, width), nn.GELU(), nn.Linear(width, 8))


class Net(nn.Module):
    """Layers, of which as many run as `forward` says; a head whose rows are cut, so that the gradient of what it gets is a summand."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(mlp() for _ in range(4)), nn.Linear(8, 50)


class Loop(Net):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[: x.shape[1] // 2]:
            x = x + layer(x)
        return self.head(x)


class Frozen(Loop):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2].requires_grad_(False)


class Picked(Net):
    """Two calls of it are traced. So the sum is made where the head takes what is picked."""

    def __init__(self) -> None:
        super().__init__()
        self.examples = [{"x": LONG[:, :n]} for n in (2, 4)]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers[x.shape[1] // 2](x))


class Skipping(nn.Module):
    """Picks one of its layers, of which one does nothing: its gradient is whole where those of the others are summands."""

    def __init__(self) -> None:
        super().__init__()
        self.examples = [{"x": LONG[:, :n]} for n in (2, 4)]
        self.first, self.layers = mlp(), nn.ModuleList([mlp(), mlp(), mlp(), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[x.shape[1] // 2](self.first(x))


class Listed(nn.Module):
    """Takes its matrices from a list of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.ParameterList(torch.randn(s) for _ in range(4)) for s in ((8, 16), (16, 8)))
        self.head = nn.Linear(8, 50)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(x.shape[1] // 2):
            x = x + F.gelu(x @ self.up[i]) @ self.down[i]
        return self.head(x)


class Scaled(Net):
    """Reads a parameter of its own for long inputs alone: beside values whose gradients are summands, or a rank's part."""

    def __init__(self, part: bool) -> None:
        super().__init__()
        self.part, self.scale = part, nn.Parameter(torch.full((1,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        if self.part:
            h = F.gelu(self.layers[0][0](x))
            return self.layers[0][2](h * self.scale if x.shape[1] > 4 else h)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x * self.scale if x.shape[1] > 4 else x)


class Between(nn.Module):
    """Runs a module for long inputs alone, on what lies between two products."""

    def __init__(self, more: nn.Module) -> None:
        super().__init__()
        self.up, self.more, self.down = nn.Linear(8, 16), more, nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(self.more(h) if x.shape[1] > 4 else F.gelu(h))


class Around(nn.Module):
    """All that its own code holds is whole: a module and a parameter that no traced call used are right."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.extra, self.scale = mlp(), mlp(24), nn.Parameter(torch.full((8,), 1.5))
        self.more = nn.ParameterList(torch.randn(8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(x)
        return self.extra(x * self.scale) + self.more[1] if x.shape[1] > 4 else x.tanh() + self.more[0]


class InBlock(nn.Module):
    """As blocks of models are: what a block's own code holds may be whole where other code of the model holds parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Around(), Between(nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def built(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().double()


def outcome(build: Callable[[], nn.Module], grads: bool, given: Any = None) -> float | str:
    """The largest error of a long call of a model that was planned with a short one, gradients included, or the refusal."""
    model = built(build)
    parallel = copy.deepcopy(model)
    autotp.parallelize(parallel, given or mesh(), example_inputs=getattr(model, "examples", {"x": SHORT}))
    assert autotp.plan_of(parallel).local_share < 0.95
    try:
        with nullcontext() if grads else torch.no_grad():
            results = [(m, m(LONG)) for m in (model, parallel)]
    except AutoTPError as error:
        return str(error)
    if grads:
        for _, result in results:
            result.square().sum().backward()
        own, theirs = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, autotp.full_grads(parallel)
        assert own.keys() == theirs.keys()
        errors = [float((own[n] - theirs[n]).abs().max()) for n in own]
    else:
        errors = []
    return max([float((results[0][1] - results[1][1]).detach().abs().max()), *errors])


def on_ranks(build: Callable[[], nn.Module], grads: bool, world: int = 2) -> list[float | str]:
    model = built(build)

    def rank(_: object) -> float | str:
        return outcome(lambda: copy.deepcopy(model), grads, init_device_mesh("cpu", (world,), mesh_dim_names=("tp",)))

    return run("local", rank, None, world, 120.0)


#: name → model, and what is refused without gradients and with them; "" for nothing
CASES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "loop": (Loop, "", "layers.2 (Sequential) is called"),
    "frozen": (Frozen, "", "layers.2 (Sequential) is called"),
    "skipped": (Skipping, "", "layers.3 (Identity) is called"),
    "picked": (Picked, "layers.3 (Sequential) is called", "layers.3 (Sequential) is called"),
    "listed": (Listed, "up.2 is read by the code of the model", "up.2 is read by the code of the model"),
    "own parameter, gradients": (lambda: Scaled(False), "", "scale is read by the code of the model"),
    "own parameter, parts": (lambda: Scaled(True), "scale is read by the code of the model", "scale is read by the code of the model"),
    "softmax of parts": (lambda: Between(nn.Softmax(-1)), "more (Softmax) is called", "more (Softmax) is called"),
    "norm of parts": (lambda: Between(nn.LayerNorm(16)), "more (LayerNorm) is called", "more (LayerNorm) is called"),
    "elements of parts": (lambda: Between(nn.Sequential(nn.ReLU(), nn.Dropout(0.0))), "", ""),
    "whole": (Around, "", ""),
    "whole in a block": (InBlock, "", ""),
}


@pytest.mark.parametrize("grads", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_right_or_refused(name: str, grads: bool) -> None:
    build, *refusals = CASES[name]
    for found in on_ranks(build, grads):
        if refusals[grads]:
            assert isinstance(found, str) and refusals[grads] in found and EXAMPLES in found
        else:
            assert isinstance(found, float) and found < 1e-9, found


class Scan(nn.Module):
    """Its state is whole before the first step, and a rank's part after it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.decay = nn.Linear(8, 16), nn.Linear(16, 8), nn.Parameter(torch.randn(16))
        self.examples = {"x": SHORT[:, :1]}

    def forward(self, x: Tensor) -> Tensor:
        u, h, states = self.up(x), x.new_zeros(x.shape[0], 16), []
        for i in range(x.shape[1]):
            h = h * self.decay.sigmoid() + u[:, i]
            states.append(h)
        return self.down(torch.stack(states, 1))


@pytest.mark.parametrize("grads", [False, True])
def test_more_steps_than_were_traced(grads: bool) -> None:
    for found in on_ranks(Scan, grads):
        assert isinstance(found, str) and "Scan: the call in Scan.forward (" in found and "Pass example_inputs of a call" in found


def test_on_processes(pool: Pool) -> None:
    assert all("layers.2 (Sequential) is called" in str(found) for found in pool.run(outcome, Loop, True, world=2))
    assert all(isinstance(found, float) and found < 1e-9 for found in pool.run(outcome, Around, True, world=2))


@pytest.mark.parametrize("name", ["loop", "picked", "skipped", "listed", "own parameter, gradients"])
def test_what_is_refused_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the guards the numbers are others."""
    monkeypatch.setattr(idle.Idle, "_clashes", lambda *_: False)
    monkeypatch.setattr(dispatch, "refuse_on_parts", lambda *_: None)
    for found in on_ranks(CASES[name][0], True):
        assert isinstance(found, float) and found > 1e-3
