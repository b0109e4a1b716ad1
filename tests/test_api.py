"""The public functions: what they refuse, what they leave alone, and what every rank sees."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

import autotp
from autotp import AutoTPError, Plan
from autotp.errors import InputError, MeshError, PlanError, TraceError
from tests.support.ranks import Pool, mesh

OUTER, WIDTH, LAST = 5, 16, 7


class Two(nn.Module):
    """Linear, relu, Linear."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, width), nn.Linear(width, LAST)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x)))


class Odd(Two):
    """Another width, of which nothing can be cut: its elements are mixed."""

    def __init__(self) -> None:
        super().__init__(15)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.softmax(self.a(x), -1))


class Untraceable(Two):
    """Leaves torch on the way."""

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.a(x))) * float(self.a(x).detach().numpy().sum())


def x() -> Tensor:
    return torch.randn(2, 3, OUTER, generator=torch.Generator().manual_seed(1), dtype=torch.float32)


def given(**more: Any) -> dict[str, Any]:
    return {"example_inputs": {"x": x()}, **more}


def llama(**fields: Any) -> Any:
    from autotp.testing.tiny.models import tiny_config

    return tiny_config("llama", **fields)


def on_meta(config: Any) -> nn.Module:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(config)


def fingerprint(model: nn.Module) -> list[Any]:
    """All that must not change: parameters by identity and value, attributes, hooks, classes, modes."""
    out: list[Any] = []
    for name, m in model.named_modules():
        attributes = {k: repr(v) for k, v in m.__dict__.items() if k not in ("_parameters", "_buffers", "_modules")}
        out.append((name, type(m), m.training, id(m.__dict__.get("forward")), attributes))
    out += [(n, id(p), p.requires_grad, p.grad is None, p.detach().clone()) for n, p in model.named_parameters()]
    out += [(n, id(b), b.clone()) for n, b in model.named_buffers()]
    return out


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        len(p) == len(q) and all(torch.equal(u, v) if isinstance(u, Tensor) else u == v for u, v in zip(p, q, strict=True))
        for p, q in zip(a, b, strict=True)
    )


# plan ---------------------------------------------------------------------------------------------------------------------------


def test_plan_of_a_module_a_config_and_a_path(tmp_path: Path) -> None:
    config = llama()
    config.save_pretrained(tmp_path)
    plans = [autotp.plan(t, tp=2, check="graph") for t in (on_meta(config), config, tmp_path, tmp_path / "config.json", str(tmp_path))]
    shapes = [{n: p.layout.local_shape for n, p in plan.params.items()} for plan in plans]
    assert shapes == shapes[:1] * 5
    assert plans[0].params["model.layers.0.self_attn.q_proj.weight"].layout.dim == 0
    assert plans[0].local_share < 0.6


@pytest.mark.parametrize("target", [3, None, "no-such-model", "/no/such/dir", "tests.test_api:absent", "tests.test_api:OUTER", Tensor])
def test_bad_targets(target: object) -> None:
    with pytest.raises(InputError):
        autotp.plan(target, tp=2)


@pytest.mark.parametrize("tp", [0, -1, 2.0, True, "2", None])
def test_bad_tp(tp: Any) -> None:
    with pytest.raises(InputError, match="tp must be"):
        autotp.plan(Two(), tp=tp, **given())


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (None, "example_inputs="),
        ([1], "mapping"),
        ({"y": 1}, "'y'"),
        ({}, "'x'"),
        ({3: 1}, "string"),
    ],
)
def test_bad_example_inputs(inputs: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        autotp.plan(Two(), tp=2, example_inputs=inputs)


def test_inputs_of_the_wrong_shape_are_a_trace_error() -> None:
    with pytest.raises(TraceError, match=r"reduction dim|shapes"):
        autotp.plan(Two(), tp=2, example_inputs={"x": torch.randn(2, OUTER + 1)})


def test_a_recipe_that_says_nothing_changes_nothing() -> None:
    assert autotp.plan(Two(), tp=2, recipe={}, **given()) == autotp.plan(Two(), tp=2, **given())


def test_one_rank_plans_nothing() -> None:
    plan = autotp.plan(Two(), tp=1)
    assert (plan.local_share, plan.modules, plan.collectives()) == (1.0, (), ())


def test_a_plan_is_immutable_and_picklable() -> None:
    plan = autotp.plan(llama(), tp=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.tp = 4  # type: ignore[misc]
    with pytest.raises(TypeError):
        plan.params["x"] = None  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        next(iter(plan.params.values())).axis = ""  # type: ignore[misc]
    again = pickle.loads(pickle.dumps(plan))
    assert isinstance(again, Plan)
    assert again == plan
    assert again.to_dict() == plan.to_dict()


def test_what_a_plan_says() -> None:
    plan = autotp.plan(llama(), tp=2)
    text = str(plan)
    assert "attention" in text and "mlp" in text and "q_proj" in text
    listed = json.loads(json.dumps(plan.to_dict()))
    assert listed["tp"] == 2
    assert "q_proj" in plan.explain("model.layers.0.self_attn.q_proj.weight")
    assert "width of the model" in plan.explain("model.norm.weight")
    assert "k_proj" in plan.explain("model.layers.0.self_attn")
    with pytest.raises(InputError, match="q_proj"):
        plan.explain("model.layers.0.self_attn.q_prj.weight")


@pytest.mark.sweep
def test_bytes_of_the_collectives() -> None:
    config = llama(
        hidden_size=16384, num_hidden_layers=1, num_attention_heads=8, num_key_value_heads=8, head_dim=2048, intermediate_size=64
    )
    found = autotp.plan(config, tp=2).collectives(tokens=8, dtype=torch.float16)
    inside = [c for c in found if ".layers.0" in c.module and c.kind == "all_reduce"]
    assert len(inside) == 4
    assert {c.bytes for c in inside} == {262144}
    assert {
        c.bytes for c in autotp.plan(config, tp=2).collectives(tokens=1, dtype=torch.float32) if c in inside or ".layers.0" in c.module
    } == {65536}
    with pytest.raises(InputError):
        autotp.plan(config, tp=2).collectives(tokens=0)


@pytest.mark.parametrize("training", [False, True])
def test_planning_leaves_the_model_alone(training: bool) -> None:
    model = Two().eval()
    model.a.train(training)
    seen: list[int] = []
    handle = model.a.register_forward_hook(lambda *_: seen.append(1))
    before = fingerprint(model)
    autotp.plan(model, tp=2, **given())
    assert same(before, fingerprint(model))
    handle.remove()
    assert not same(before, fingerprint(model))  # the fingerprint sees hooks
    assert model(x()).shape == (2, 3, LAST)


def test_a_failed_plan_leaves_the_model_alone() -> None:
    for model, inputs in ((Untraceable().eval(), x()), (Two().eval(), torch.randn(2, 4))):
        before = fingerprint(model)
        with pytest.raises(AutoTPError):
            autotp.plan(model, tp=2, example_inputs={"x": inputs})
        assert same(before, fingerprint(model))


@pytest.mark.sweep
def test_depth_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from autotp.planner import make_plan

    sizes: list[int] = []
    original = make_plan.trace

    def counted(*args: Any, **kwargs: Any) -> Any:
        graph = original(*args, **kwargs)
        sizes.append(len(graph.nodes))
        return graph

    monkeypatch.setattr(make_plan, "trace", counted)
    shares = []
    for depth in (2, 32, 126):
        plan = autotp.plan(on_meta(llama(num_hidden_layers=depth)), tp=2, check="graph")
        shares.append(plan.params[f"model.layers.{depth - 1}.mlp.up_proj.weight"].layout)
        reduced = [c for c in plan.collectives() if ".layers." in c.module and c.when == "forward"]
        assert len(reduced) == 2 * depth
    assert shares == shares[:1] * 3
    assert sizes[0] > 50
    assert sizes[1] - sizes[0] < 10 + 32 * 4  # at most a few marks a block, no operator
    assert sizes[2] - sizes[1] < 10 + 94 * 4


# parallelize, in one process ----------------------------------------------------------------------------------------------------


def test_no_process_group() -> None:
    for wrong in (None, "tp", object()):
        with pytest.raises(MeshError, match="process group"):
            autotp.parallelize(Two(), wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Module"):
        autotp.parallelize("llama", None)  # type: ignore[arg-type]


def test_what_is_not_parallel_has_no_plan() -> None:
    for function in (autotp.plan_of, autotp.full_state_dict, autotp.full_grads):
        with pytest.raises(PlanError, match="not parallel"):
            function(Two())
        with pytest.raises(InputError):
            function(3)  # type: ignore[arg-type]


def test_errors_are_of_one_family() -> None:
    assert all(issubclass(e, AutoTPError) and issubclass(e, RuntimeError) for e in (InputError, MeshError, PlanError, TraceError))


# parallelize, on ranks ----------------------------------------------------------------------------------------------------------


def seeded(cls: type[nn.Module] = Two) -> Any:
    torch.manual_seed(0)
    return cls().double().eval()


def attempt(model: nn.Module, line: Any = None, **options: Any) -> tuple[str, str, bool]:
    """(error, its text, was the model left as it was) of a call that fails."""
    before = fingerprint(model)
    try:
        autotp.parallelize(model, mesh() if line is None else line, **options)
    except Exception as error:
        return type(error).__name__, str(error), same(before, fingerprint(model))
    return "", "", False


def doubles() -> dict[str, Any]:
    return {"example_inputs": {"x": x().double()}}


def _agrees(line: Any) -> float:
    model = seeded()
    want = model(x().double())
    autotp.parallelize(model, line, **doubles())
    assert autotp.plan_of(model).params["a.weight"].layout.dim == 0
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return float((model(x().double()) - want).detach().abs().max())


def meshes() -> list[Any]:
    size = dist.get_world_size()
    unnamed, plain = init_device_mesh("cpu", (size,)), init_device_mesh("cpu", (size,), mesh_dim_names=("other",))
    return [_agrees(unnamed), _agrees(plain), attempt(seeded(), 3, **doubles())]


def test_one_dimensional_meshes(pool: Pool) -> None:
    for one, two, (error, text, kept) in pool.run(meshes):
        assert max(one, two) < 1e-12
        assert (error, kept) == ("MeshError", True)
        assert "DeviceMesh" in text


def square_meshes() -> list[Any]:
    named = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    error = _agrees(named)
    unnamed = attempt(seeded(), init_device_mesh("cpu", (2, 2)), **doubles())
    other = attempt(seeded(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")), **doubles())
    model = seeded()
    autotp.parallelize(model, named, **doubles())
    return [error, unnamed, other, autotp.plan_of(model).tp, model.a.weight.device_mesh.mesh.tolist()]


def test_a_mesh_with_a_tp_dim(pool: Pool) -> None:
    for rank, (error, unnamed, other, tp, line) in enumerate(pool.run(square_meshes, world=4)):
        assert error < 1e-12
        assert tp == 2
        assert line == ([0, 1] if rank < 2 else [2, 3])
        for kind, text, kept in (unnamed, other):
            assert (kind, kept) == ("MeshError", True)
            assert "'tp'" in text


def alone() -> list[Any]:
    line = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"))
    model = seeded()
    before = fingerprint(model)
    assert autotp.parallelize(model, line) is model
    plan = autotp.plan_of(model)
    model.__dict__.pop("_autotp")
    return [plan.tp, plan.local_share, same(before, fingerprint(model))]


def test_one_rank_changes_nothing(pool: Pool) -> None:
    assert pool.run(alone) == [[1, 1.0, True]] * 2


def differing(kind: str) -> tuple[str, str, bool]:
    odd = dist.get_rank() == 1
    model: Any = seeded(Odd if kind == "shape" and odd else Untraceable if kind == "class" and odd else Two)
    if kind == "weight" and odd:
        with torch.no_grad():
            model.b.weight[0, 0] += 1e-9
    if kind == "dtype" and odd:
        model.float()
    return attempt(model, **doubles())


@pytest.mark.parametrize("kind", ["weight", "class", "shape", "dtype"])
def test_models_that_differ_between_ranks(pool: Pool, kind: str) -> None:
    found = pool.run(differing, kind)
    for error, text, kept in found:
        assert (error, kept) == ("PlanError", True)
        assert "differ between ranks" in text
    assert found[0][1] == found[1][1]
    if kind == "weight":
        assert "b.weight" in found[0][1]


def refusals() -> list[tuple[str, str, bool]]:
    again = seeded()
    autotp.parallelize(again, mesh(), **doubles())
    before = dict(again.named_parameters())
    parallel = attempt(again, **doubles())
    inside = attempt(nn.Sequential(again), example_inputs={"input": x().double()})
    kept = all(p is before[n] for n, p in again.named_parameters())
    try:
        autotp.plan(again, tp=2)
    except PlanError as error:
        planned = str(error)
    return [
        (*parallel[:2], kept),
        (*inside[:2], kept),
        ("PlanError", planned, True),
        attempt(seeded(Odd), strict=True, **doubles()),
        attempt(seeded(Untraceable), **doubles()),
        attempt(seeded()),
        attempt(seeded(), example_inputs={"y": 1}),
    ]


def test_refusals_leave_the_model_alone_on_every_rank(pool: Pool) -> None:
    answers = pool.run(refusals)
    assert answers[0] == answers[1]
    parallel, inside, planned, strict, untraceable, none, wrong = answers[0]
    assert [a[0] for a in answers[0]] == ["PlanError"] * 4 + ["TraceError", "InputError", "InputError"]
    assert all(kept for _, _, kept in answers[0])
    assert all("already parallel" in text for _, text, _ in (parallel, inside, planned))
    assert "a.weight" in strict[1] and "b.weight" in strict[1] and "softmax mixes the elements" in strict[1]
    assert "a.bias" not in strict[1]
    assert "example_inputs" in none[1] and "'y'" in wrong[1]
    assert untraceable[1]


def fails_on_one(rank: int) -> tuple[str, str, bool]:
    model = seeded()
    if dist.get_rank() == rank:
        import autotp.install

        def broken(*args: Any, **kwargs: Any) -> Any:
            raise ZeroDivisionError("on purpose")

        original, autotp.install.apply = autotp.install.apply, broken
        try:
            return attempt(model, **doubles())
        finally:
            autotp.install.apply = original
    return attempt(model, **doubles())


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_on_one_rank_reaches_all(pool: Pool, rank: int) -> None:
    answers = pool.run(fails_on_one, rank, timeout=30)
    for own, (error, text, _) in enumerate(answers):
        assert error == "AutoTPError"
        assert f"rank {rank} failed with ZeroDivisionError: on purpose" in text
        assert own != rank or answers[own][2]


def half_applied() -> list[bool]:
    """The other ranks had already rewritten their model when one failed."""
    return [fails_on_one(1)[2]]


def test_an_error_on_one_rank_leaves_all_models_alone(pool: Pool) -> None:
    assert pool.run(half_applied, timeout=30) == [[True]] * 2


def on_meta_device() -> list[Any]:
    model = on_meta(llama())
    autotp.parallelize(model, mesh())
    weight: Any = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    return [weight.device.type, tuple(weight.shape), tuple(weight.to_local().shape), autotp.plan_of(model).local_share]


def test_meta_models(pool: Pool) -> None:
    for device, full, local, share in pool.run(on_meta_device):
        assert device == "meta"
        assert local == (full[0] // 2, full[1])
        assert share < 0.6


class NoCopies(Two):
    """Refuses to be copied."""

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("copied")


def without_copies() -> list[Any]:
    model = seeded(NoCopies)
    want = model(x().double())
    got = autotp.parallelize(model, mesh(), **doubles())
    return [got is model, type(model).__name__, float((model(x().double()) - want).detach().abs().max()), [*model.state_dict()]]


def test_in_place_without_copies(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="copied"):
        copy.deepcopy(NoCopies())
    for got in pool.run(without_copies):
        assert got[:2] == [True, "NoCopies"]
        assert got[2] < 1e-12
        assert got[3] == ["a.weight", "a.bias", "b.weight", "b.bias"]


def sampled(options: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Tokens of one process and of the ranks, from one seed."""
    from autotp.testing.tiny.models import tiny_model

    plain: Any = tiny_model(llama()).double()
    parallel: Any = tiny_model(llama()).double()
    autotp.parallelize(parallel, mesh())
    ids = torch.arange(10).reshape(2, 5) + 3
    out = []
    for model in (plain, parallel):
        torch.manual_seed(7)
        out.append(model.generate(ids, max_new_tokens=8, pad_token_id=0, **options).tolist())
    return out[0], out[1]


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "temperature": 1.5, "top_k": 0},
        {"do_sample": True, "top_p": 0.9, "num_beams": 2},
        {"cache_implementation": "static", "disable_compile": True},
    ],
    ids=["sample", "beam", "static"],
)
def test_generation_is_that_of_one_process(pool: Pool, options: dict[str, Any]) -> None:
    answers = pool.run(sampled, {**options})
    plain = answers[0][0]
    assert all(got == plain for pair in answers for got in pair)
    assert len(plain[0]) > 5
