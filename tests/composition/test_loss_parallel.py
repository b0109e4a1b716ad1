"""Logits in parts beside FSDP2, adapters, compiled code, recipes and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import autotp
from autotp.errors import InputError, PlanError
from autotp.plan.loss_parallel import logits_in_parts
from autotp.rewrite.logits.logits import ParallelLogits
from tests.composition.training import Data, adamw, apart, build, by_block, loss_of, mesh_of, train
from tests.support.ranks import Pool
from tests.support.slow import swept

RECIPE = {"placements": {"loss_parallel": True}}


def under_fsdp(kind: str) -> float:
    """Three clipped steps of AdamW beside one device with all batches."""
    mesh, alone = mesh_of(2, 2), build(kind)
    model = by_block(autotp.parallelize(copy.deepcopy(alone), mesh, loss_parallel=True, check="graph"), mesh)
    assert type(model(input_ids=Data.here(mesh).ids(0)).logits) is ParallelLogits
    model.reshard()  # type: ignore[operator]
    norms = train(model, adamw(model), Data.here(mesh), range(3))
    wanted = train(alone, adamw(alone), Data(2), range(3))
    return max(apart(alone.state_dict(), autotp.full_state_dict(model)), *(abs(a - b) for a, b in zip(norms, wanted, strict=True)))


@pytest.mark.parametrize("kind", swept(["padded", "tied", "fused"], "padded"))
def test_under_fsdp(pool: Pool, kind: str) -> None:
    assert max(pool.run(under_fsdp, kind, world=4)) <= 1e-9


def compiled() -> float:
    """Code that is compiled gathers: it knows no tensors of ours."""
    mesh, alone = mesh_of(1, 2), build("tied")
    model = autotp.parallelize(copy.deepcopy(alone), mesh, loss_parallel=True, check="graph")
    quick: Any = torch.compile(model, backend="aot_eager")
    logits = quick(input_ids=Data(1).ids(0), use_cache=False).logits
    assert type(logits) is Tensor
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), Data(1).ids(0).flatten()).backward()
    torch.nn.functional.cross_entropy(alone(input_ids=Data(1).ids(0)).logits.flatten(0, 1), Data(1).ids(0).flatten()).backward()
    return apart({n: p.grad for n, p in alone.named_parameters()}, autotp.full_grads(model))  # type: ignore[misc]


@pytest.mark.sweep
def test_compiled(pool: Pool) -> None:
    assert max(pool.run(compiled)) <= 1e-9


def adapted() -> float:
    """A model that is planned again, because adapters came, keeps its logits in parts."""
    peft = pytest.importorskip("peft")
    mesh, alone = mesh_of(1, 2), build("even")
    model = autotp.parallelize(copy.deepcopy(alone), mesh, loss_parallel=True, check="graph")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    models = []
    for m in (alone, model):
        torch.manual_seed(0)
        models.append(peft.get_peft_model(m, config))
    losses = [loss_of(m, Data(1).ids(0)) for m in models]
    assert type(models[1](input_ids=Data(1).ids(0)).logits) is ParallelLogits
    return float((losses[0] - losses[1]).abs())


def test_with_adapters(pool: Pool) -> None:
    assert max(pool.run(adapted)) <= 1e-9


def loaded(path: str) -> list[bool]:
    """A recipe asks for it too: in `from_pretrained`, and in a plan that was made ahead."""
    mesh, alone = mesh_of(1, 2), build("tied")
    if mesh.get_rank() == 0:
        alone.save_pretrained(path)  # type: ignore[operator]
    torch.distributed.barrier()
    plan = autotp.plan(path, tp=2, loss_parallel=True, check="graph")
    assert autotp.Recipe.from_plan(plan).to_plan() == plan and autotp.Recipe.from_plan(plan, pin=False).placements.loss_parallel
    found = [autotp.from_pretrained(path, mesh, recipe=RECIPE), autotp.from_pretrained(path, mesh, plan=plan)]
    wanted = alone(input_ids=Data(1).ids(0)).logits
    return [
        type(logits := m(input_ids=Data(1).ids(0)).logits) is ParallelLogits and torch.allclose(logits.full_tensor(), wanted) for m in found
    ]


def test_loaded(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(loaded, str(tmp_path)) == [[True, True]] * 2


def test_the_plan_says_so() -> None:
    model = build("even")
    plain, lazy = autotp.plan(model, tp=2, check="graph"), autotp.plan(model, tp=2, check="graph", loss_parallel=True)
    assert logits_in_parts(lazy) == ("lm_head",) and not logits_in_parts(plain)
    assert "lazy gather" in lazy.explain("lm_head") and "lazy gather" not in plain.explain("lm_head")
    moved = [sum(c.bytes for c in p.collectives() if c.kind == "all_gather") for p in (plain, lazy)]
    assert moved == [40 * 2, 4 * 2]  # 40 tokens; two numbers of each of two ranks
    assert autotp.plan(model, tp=2, check="graph", recipe=RECIPE) == lazy
    nothing = autotp.plan(
        build("state space").backbone, tp=2, check="graph", example_inputs={"input_ids": Data(1).ids(0)}, loss_parallel=True
    )
    assert any("loss_parallel changes nothing" in note for note in nothing.notes)
    with pytest.raises(PlanError, match="stays in parts"):
        lazy.to_tp_plan()
    with pytest.raises(InputError, match="loss_parallel is 'yes', wanted True or False"):
        autotp.plan(model, tp=2, loss_parallel="yes")  # type: ignore[arg-type]
