"""The general rewrite on a toy with one of everything, two real ranks, and its negative controls."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from autotp.errors import PlanError
from autotp.plan.spec import GradSum
from autotp.rewrite.apply import apply
from autotp.rewrite.collectives.comm import DryComm
from autotp.rewrite.parameters.full import full_state_dict
from tests.rewrite.plans import error, rewrite, worst_grad
from tests.rewrite.toys import Toy, toy_plan
from tests.support.ranks import Pool

IDS = torch.tensor([[1, 5, 9, 15, 8], [2, 3, 4, 7, 9]])


def run_toy(drop: str = "") -> dict[str, float]:
    """Errors of outputs and gradients; `drop` names what a negative control leaves out."""
    reference, model = Toy(), Toy()
    params, modules = toy_plan(model)
    if drop == "grad":
        modules = [replace(m, uses=tuple(replace(u, grad=GradSum.NONE) for u in m.uses)) for m in modules]
    if drop == "once":
        modules = [replace(m, uses=tuple(replace(u, conversions=()) if u.name == "bias" else u for u in m.uses)) for m in modules]
    if drop == "copy":
        modules = [replace(m, inputs=()) if m.path.endswith("up") else m for m in modules]
    comm, _ = rewrite(model, params, modules)
    errors = {}
    with torch.no_grad():
        errors["inference"] = error(reference(IDS)["logits"], model(IDS)["logits"])
    weights = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).double()
    for m in (reference, model):
        (m(IDS)["logits"] * weights).sum().backward()
    errors["grad"] = worst_grad(reference, model, params, comm)
    full = full_state_dict(model, params, comm)
    errors["state"] = float(not all(torch.equal(full[k], v) for k, v in reference.state_dict().items()))
    attention = model.blocks[0].attention
    assert attention.config.heads == 2 and model.config.heads == 4 and attention.sizes == (12, 6, 6)
    x, bias = torch.randn(2, 5, 24).double(), torch.zeros(4, 1, 1).double()
    a, b = attention(x, extra={"bias": bias}), reference.blocks[0].attention(x, extra={"bias": bias})
    errors["tuple"] = max(error(b[0], a[0]), error(b[1], a[1]))
    assert not {"q_scale", "slopes", "weight"} & attention.__dict__.keys() and "position" not in model.__dict__
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.position._local_tensor.zero_()
        twin.blocks[0].attention.q_scale._local_tensor.zero_()
        errors["deepcopy"] = error(reference(IDS)["logits"], model(IDS)["logits"])
        assert error(reference(IDS)["logits"], twin(IDS)["logits"]) > 1e-3
    return errors


def test_everything_at_once(pool: Pool) -> None:
    for errors in pool.run(run_toy):
        assert all(e <= 1e-9 for e in errors.values()), errors


@pytest.mark.parametrize(("drop", "fails"), [("grad", "grad"), ("once", "inference"), ("copy", "grad")])
def test_negative_controls(pool: Pool, drop: str, fails: str) -> None:
    assert pool.run(run_toy, drop)[0][fails] > 1e-6


def compiled(backend: str) -> dict[str, float]:
    reference, model = Toy(), Toy()
    params, modules = toy_plan(model)
    comm, _ = rewrite(model, params, modules)
    run = torch.compile(model, backend=backend)
    errors = {}
    with torch.no_grad():
        errors["inference"] = error(reference(IDS)["logits"], run(IDS)["logits"])
    reference(IDS)["logits"].square().sum().backward()
    run(IDS)["logits"].square().sum().backward()
    errors["grad"] = worst_grad(reference, model, params, comm)
    return errors


@pytest.mark.filterwarnings("ignore")
def test_compile_with_graph_breaks_at_sites(pool: Pool) -> None:
    for errors in pool.run(compiled, "aot_eager"):
        assert all(e <= 1e-9 for e in errors.values()), errors


def dry(model: torch.nn.Module, params: object, modules: object) -> None:
    apply(
        model, params, modules, comm=DryComm(2),  # type: ignore[arg-type]
        make_param=lambda name, old, layout: torch.nn.Parameter(layout.shard(old.detach(), 0)),
    )  # fmt: skip


def test_a_wrong_int_at_a_site_is_an_error() -> None:
    model = Toy()
    params, modules = toy_plan(model)
    wrong = [replace(m, sites=tuple(replace(s, ints=tuple((i, v + 1, n) for i, v, n in s.ints)) for s in m.sites)) for m in modules]
    dry(model, params, wrong)
    with pytest.raises(PlanError, match=r"blocks\.0\.attention: int argument 2 of the call in Attention\.forward.* is 24"):
        model(IDS)
    assert "position" not in model.__dict__


def test_a_plan_that_does_not_fit_changes_nothing() -> None:
    model = Toy()
    params, modules = toy_plan(model)
    del params["position"]
    with pytest.raises(PlanError, match="parameters without a plan"):
        dry(model, params, modules)
    params, modules = toy_plan(model)
    modules = [*modules, replace(modules[0], path="blocks.7")]
    with pytest.raises(PlanError, match=r"blocks\.7"):
        dry(model, params, modules)
    assert type(model.embed) is torch.nn.Embedding and model.blocks[0].attention.config is model.config
