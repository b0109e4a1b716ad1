"""Modules that no traced call runs, but that own a sharded parameter of other modules: as on one device, or an error that says so."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.errors import AutoTPError, PlanError
from autotp.testing.ranks.run import run
from autotp.testing.tiny.models import tiny_config, tiny_model

IDS = torch.tensor([[0, 5, 63, 64], [127, 1, 64, 2]])


class Scaled(nn.Embedding):
    def __init__(self, rows: int, width: int, scale: float) -> None:
        super().__init__(rows, width)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale


class Tied(nn.Module):
    """The model's own table is `shared`, but what it calls is `table`; `head` is a Linear on the same weight."""

    def __init__(self, shared: nn.Module, table: nn.Module, head: bool = True) -> None:
        super().__init__()
        self.shared, self.table = shared, table
        self.head = nn.Linear(16, 128, bias=False)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.spare = nn.Linear(16, 32)
        self.table.weight = self.shared.weight
        if head:
            self.head.weight = self.shared.weight
        self.spare.weight = self.first.weight
        self.spare.bias = self.first.bias

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        return self.head(x + self.second(F.gelu(self.first(x))))


def tied(kind: str) -> Tied:
    torch.manual_seed(0)
    plain, scaled = (lambda: nn.Embedding(128, 16)), (lambda: Scaled(128, 16, 3.0))
    pair = {
        "alike": (plain(), plain()),
        "scaled alike": (scaled(), scaled()),
        "another scale": (Scaled(128, 16, 2.0), scaled()),
        "another class": (plain(), scaled()),
    }
    return Tied(*pair[kind]).double()


def on_ranks(model: nn.Module, call, tp: int = 2, backend: str = "local", inputs=None) -> list:
    """For each rank: the result of a call and the gradient of the shared weight, or the error."""

    def rank(_: object) -> object:
        parallel = copy.deepcopy(model)
        autotp.parallelize(parallel, init_device_mesh("cpu", (tp,), mesh_dim_names=("tp",)), example_inputs=inputs)
        try:
            result = call(parallel)
        except AutoTPError as error:
            return str(error)
        (result * torch.arange(result.numel(), dtype=result.dtype).view_as(result)).sum().backward()
        return result.detach(), dict(autotp.full_grads(parallel))

    return run(backend, rank, None, tp, 120.0)


def compare(model: nn.Module, call, tp: int = 2, backend: str = "local", inputs=None) -> None:
    wanted = call(model)
    (wanted * torch.arange(wanted.numel(), dtype=wanted.dtype).view_as(wanted)).sum().backward()
    for result, grads in on_ranks(model, call, tp, backend, inputs):
        torch.testing.assert_close(result, wanted.detach(), rtol=1e-12, atol=1e-12)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-9, atol=1e-12)
            else:
                assert name not in grads
    model.zero_grad(set_to_none=True)


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("kind", ["alike", "scaled alike"])
def test_a_module_alike_takes_the_plan_of_its_twin(kind, tp):
    model = tied(kind)
    compare(model, lambda m: m.shared(IDS), tp, inputs={"ids": IDS})
    compare(model, lambda m: m(IDS) + m.head(m.shared(IDS)), tp, inputs={"ids": IDS})


@pytest.mark.sweep
def test_over_processes():
    compare(tied("alike"), lambda m: m.shared(IDS), backend="gloo", inputs={"ids": IDS})


@pytest.mark.parametrize("kind", ["another scale", "another class"])
def test_another_module_on_the_same_parameter_refuses_to_be_called(kind):
    for error in on_ranks(tied(kind), lambda m: m.shared(IDS), inputs={"ids": IDS}):
        assert "shared (" in error
        assert "no traced call" in error
        assert "shared.weight.full_tensor()" in error


def test_a_part_that_leaves_a_region_open_is_refused():
    """`first` returns a rank's part, so what is tied to it cannot do as it does."""
    for error in on_ranks(tied("alike"), lambda m: m.spare(torch.ones(2, 16, dtype=torch.float64)), inputs={"ids": IDS}):
        assert "spare (Linear) was called" in error


def test_what_it_refuses_is_there_whole():
    model = tied("another class")
    for whole, _ in on_ranks(model, lambda m: m.shared.weight.full_tensor() * m.head(m.table(IDS)).sum(), inputs={"ids": IDS}):
        assert whole.shape == (128, 16)


@pytest.mark.parametrize("kind", ["t5", *(pytest.param(k, marks=pytest.mark.slow) for k in ("bart", "m2m_100"))])
def test_the_input_embedding_of_encoder_decoder_models(kind):
    model = tiny_model(tiny_config(kind)).double()
    assert any(n.startswith("shared") or ".shared" in n for n, _ in model.named_modules())
    compare(model, lambda m: m.get_input_embeddings()(IDS))


def test_a_plan_says_which_modules_refuse():
    marked = [m.path for m in autotp.plan(tied("another class"), tp=2, example_inputs={"ids": IDS}).modules if m.uncalled]
    assert marked == ["shared", "spare"]
    assert issubclass(PlanError, AutoTPError)
