"""Tables whose gradients are sparse, or count the ids: the table stays whole, the rest of the model does not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autotp
from autotp.plan.expressions import Factor
from autotp.plan.layout import Layout
from autotp.plan.spec import GradSum
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.parameters.make import as_dtensor
from autotp.rewrite.parameters.reads import GradFix, read_param
from tests.support.ranks import Pool, mesh
from tests.support.slow import in_turns

IDS = (torch.arange(12).view(2, 6) * 7) % 40
OFTEN = IDS % 5


class Net(nn.Module):
    def __init__(self, table: nn.Module, tied: bool = False) -> None:
        super().__init__()
        self.emb, self.up, self.down, self.head = table, nn.Linear(16, 36), nn.Linear(36, 16), nn.Linear(16, 40, bias=False)
        if tied:
            self.head.weight = table.weight  # type: ignore[assignment]

    def forward(self, ids: Tensor) -> Tensor:
        x = self.emb(ids)
        return self.head(x + self.down(F.gelu(self.up(x))))  # type: ignore[no-any-return]


class Called(nn.Module):
    """The table is a parameter, and the lookup a call."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.weight, self.options = nn.Parameter(torch.randn(40, 16)), options

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight, **self.options)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sparse": lambda: Net(nn.Embedding(40, 16, sparse=True)),
    "sparse, padding": lambda: Net(nn.Embedding(40, 16, padding_idx=1, sparse=True)),
    "sparse, tied": lambda: Net(nn.Embedding(40, 16, sparse=True), tied=True),
    "sparse call": lambda: Net(Called(sparse=True)),
    "by frequency": lambda: Net(nn.Embedding(40, 16, scale_grad_by_freq=True)),
    "by frequency, tied": lambda: Net(nn.Embedding(40, 16, scale_grad_by_freq=True), tied=True),
    "by frequency, call": lambda: Net(Called(scale_grad_by_freq=True)),
    "bag": lambda: Net(nn.EmbeddingBag(40, 16, mode="sum", sparse=True)),
    "bag of means": lambda: Net(nn.EmbeddingBag(40, 16, mode="mean", sparse=True)),
}


def _split(model: Any, make: Callable[[Any], Any]) -> list[Any]:
    """The optimizer of the table, and AdamW for the rest."""
    table = model.emb.weight
    return [make([table]), torch.optim.AdamW([p for p in model.parameters() if p is not table], lr=0.01)]


STEPS: dict[str, Callable[[Any], list[Any]]] = {
    "SGD": lambda m: [torch.optim.SGD(m.parameters(), lr=0.003)],
    "SGD with momentum": lambda m: [torch.optim.SGD(m.parameters(), lr=0.003, momentum=0.9)],
    "SGD foreach": lambda m: [torch.optim.SGD(m.parameters(), lr=0.003, foreach=True)],
    "Adagrad": lambda m: _split(m, lambda params: torch.optim.Adagrad(params, lr=0.003)),
    "SparseAdam": lambda m: _split(m, lambda params: torch.optim.SparseAdam(params, lr=0.003)),
}


def whole(t: Any) -> Tensor:
    t = t.detach()
    t = t.full_tensor() if isinstance(t, DTensor) else t
    return t.to_dense() if t.is_sparse else t.clone()  # type: ignore[no-any-return]


def trained(model: Any, optimizers: list[Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for step in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for ids in (IDS, OFTEN):  # two backwards: gradients are added up
            loss = model(ids).sin().mean()
            loss.backward()
            found[f"loss {step}"] = loss.detach()
        for n, p in model.named_parameters():
            found[f"{step} {n}"], found[f"{step} {n} is sparse"] = whole(p.grad), torch.tensor(float(p.grad.is_sparse))
        for optimizer in optimizers:
            optimizer.step()
    return found | {n: whole(p) for n, p in model.named_parameters()}


def compared(name: str) -> dict[str, float]:
    errors: dict[str, float] = {}
    torch.manual_seed(0)
    original = MODELS[name]().double()
    parallel = copy.deepcopy(original)
    autotp.parallelize(parallel, mesh(), example_inputs={"ids": IDS})
    plan: Any = autotp.plan_of(parallel)
    assert plan.checked == "numbers" and plan.params["emb.weight"].layout.dim is None
    assert plan.params["up.weight"].layout.dim == 0 and plan.params["down.weight"].layout.dim == 1
    for step, make in STEPS.items():
        plain, model = copy.deepcopy(original), copy.deepcopy(parallel)
        try:
            wanted = trained(plain, make(plain))
        except (RuntimeError, NotImplementedError):  # torch has no such step for these gradients
            continue
        got = trained(model, make(model))
        assert got.keys() == wanted.keys()
        errors |= {f"{step}: {n}": float((got[n] - w).abs().max() / (w.abs().max() + 1e-12)) for n, w in wanted.items()}
        assert wanted["0 emb.weight is sparse"] == float(("sparse" in name or "bag" in name) and "tied" not in name)
    assert len(errors) > 60
    return errors


@pytest.mark.parametrize(("name", "world"), in_turns(MODELS, (2, 3)))
def test_trained_as_on_one_device(pool: Pool, name: str, world: int) -> None:
    for errors in pool.run(compared, name, world=world):
        assert all(error < 1e-9 for error in errors.values()), {n: e for n, e in errors.items() if e >= 1e-9}


def test_others_are_cut() -> None:
    """The control: without the options a plan cuts the table."""
    plan: Any = autotp.plan(Net(nn.Embedding(40, 16)), tp=2, example_inputs={"ids": IDS}, check="graph")
    assert plan.params["emb.weight"].layout.dim == 0


@pytest.mark.parametrize("name", ["sparse", "by frequency"])
def test_the_reason_is_the_option(name: str) -> None:
    plan: Any = autotp.plan(MODELS[name](), tp=2, example_inputs={"ids": IDS}, check="graph")
    assert ("sparse=True" if name == "sparse" else "scale_grad_by_freq=True") in str(plan)


def summed(same: bool) -> tuple[float, str]:
    """How far the sum of sparse gradients is from that of dense ones, and what a cut parameter or other rows on other ranks give."""
    line = mesh()
    rank, comm = line.get_local_rank(), GroupComm(line.get_group())
    kept, cut = (Layout((8, 4), (Factor("rows", 8, shard), Factor("width", 4)), 2) for shard in (False, True))
    ids = torch.tensor([1, 2, 2, 5] if same else [1, 2, 2, rank])
    grads: list[Tensor] = []
    for sparse in (True, False):
        p = nn.Parameter(as_dtensor(torch.zeros(8, 4, dtype=torch.float64), kept, line))
        for _ in range(2):
            local = read_param(p, GradFix(GradSum.ALL, kept, comm))
            try:
                (F.embedding(ids, local, sparse=sparse) * (rank + 1)).sum().backward()
            except autotp.AutoTPError as error:
                return 0.0, str(error)
        assert p.grad is not None
        grads.append(whole(p.grad))
    p = nn.Parameter(as_dtensor(torch.zeros(4, 4, dtype=torch.float64), cut, line))
    with pytest.raises(autotp.AutoTPError) as caught:
        F.embedding(ids % 4, read_param(p, GradFix(GradSum.NONE, cut, comm)), sparse=True).sum().backward()
    return float((grads[0] - grads[1]).abs().max()), str(caught.value)


@pytest.mark.parametrize("same", [True, False])
def test_sums_over_ranks(pool: Pool, same: bool) -> None:
    for error, said in pool.run(summed, same):
        assert error == 0 and "sparse=False" in said, said
