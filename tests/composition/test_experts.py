"""Experts that are dealt whole, beside FSDP2, checkpoints, adapters, compiled code, recipes and generation."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict

import autotp
from autotp.api import parallelize_as
from autotp.errors import PlanError
from autotp.plan.experts import whole_experts
from autotp.plan.plan import Plan
from tests.composition.training import LLAMA, Data, adamw, apart, by_block, grads_of, loss_of, mesh_of, train
from tests.experts.models import HIDDEN, WIDTH, Model, inputs
from tests.support.ranks import Pool

_PLANS: dict[tuple[int, int], Plan] = {}
RECIPE = {"placements": {"experts": "whole"}}


def build(number: int = 5, seed: int = 0, implementation: str = "eager") -> nn.Module:
    """A Mixtral in float64; three or five experts are uneven over two ranks, and leave a rank of four with none."""
    torch.manual_seed(seed)
    config = transformers.MixtralConfig(
        **{**LLAMA, "intermediate_size": 24, "num_local_experts": number, "experts_implementation": implementation}  # type: ignore[arg-type]
    )
    model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    return model.double().train()


def parallel(model: nn.Module, *shape: int) -> nn.Module:
    """A copy of `model` over the tp dim of a mesh, its experts whole."""
    key, mesh = (model.config.num_local_experts, shape[-1]), mesh_of(*shape)  # type: ignore[union-attr]
    if key in _PLANS:
        return parallelize_as(copy.deepcopy(model), mesh, _PLANS[key])
    made = autotp.parallelize(copy.deepcopy(model), mesh, experts="whole", check="graph")
    _PLANS[key] = autotp.plan_of(made)
    assert len(whole_experts(_PLANS[key])) == 2
    return made


def under_fsdp(number: int) -> float:
    """Three clipped steps of AdamW beside one device with all batches."""
    mesh, alone = mesh_of(2, 2), build(number)
    model = by_block(parallel(alone, 2, 2), mesh)
    norms = train(model, adamw(model), Data.here(mesh), range(3))
    wanted = train(alone, adamw(alone), Data(2), range(3))
    return max(apart(alone.state_dict(), autotp.full_state_dict(model)), *(abs(a - b) for a, b in zip(norms, wanted, strict=True)))


def test_under_fsdp(pool: Pool) -> None:
    assert max(pool.run(under_fsdp, 5, world=4)) <= 1e-9


def to_one() -> float:
    """Every token goes to the experts of one rank; the other one still meets every collective, and has zero gradients."""
    alone = build(4)
    with torch.no_grad():
        for block in alone.model.layers:  # type: ignore[union-attr]
            block.mlp.gate.weight.zero_()  # the router takes the first ones of equals
    model = parallel(alone, 1, 2)
    for step in range(2):
        for m in (alone, model):
            loss_of(m, Data(1).ids(step)).backward()
    whole = autotp.full_grads(model)
    assert set(whole) == {n for n, p in alone.named_parameters() if p.grad is not None}
    used = alone.model.layers[0].mlp.experts.down_proj.grad.flatten(1).norm(dim=1).count_nonzero()  # type: ignore[union-attr]
    assert int(used) == 2
    return apart(grads_of(alone), whole)


def test_all_to_one_rank(pool: Pool) -> None:
    assert max(pool.run(to_one)) <= 1e-9


def saved(path: str) -> float:
    """Saved by two ways in the middle of training, and read by ranks of other meshes and by one device."""
    alone = build(3)
    model, data = by_block(parallel(alone, 2, 2), mesh_of(2, 2)), Data.here(mesh_of(2, 2))
    optimizer, other = adamw(model), adamw(alone)
    train(model, optimizer, data, range(2))
    train(alone, other, Data(data.of), range(2))
    autotp.checkpoint.save(model, optimizer, f"{path}/state")
    states, _ = get_state_dict(model, optimizer)
    dcp.save({"model": states}, checkpoint_id=f"{path}/dcp")
    worst = apart(alone.state_dict(), autotp.full_state_dict(model))
    for shape in ((2, 2), (1, 4)):
        again = parallel(build(3, seed=5), *shape)
        autotp.checkpoint.load(again, adamw(again), f"{path}/state")
        worst = max(worst, apart(alone.state_dict(), autotp.full_state_dict(again)))
    plain = build(3, seed=6).state_dict()
    dcp.load({"model": plain}, checkpoint_id=f"{path}/dcp", no_dist=True)
    return max(worst, apart(alone.state_dict(), plain))


@pytest.mark.sweep
def test_checkpoints(pool: Pool, tmp_path: Path) -> None:
    assert max(pool.run(saved, str(tmp_path), world=4)) <= 1e-9


def loaded(path: str) -> list[bool]:
    """A recipe asks for it too, and a plan that was made ahead; a rank has its own experts alone."""
    mesh, alone = mesh_of(1, 2), build(4).float()  # grouped products, which a loaded model makes, have no float64
    if mesh.get_rank() == 0:
        alone.save_pretrained(path)  # type: ignore[operator]
    dist.barrier()
    plan = autotp.plan(path, tp=2, experts="whole", check="graph")
    wanted = alone.eval()(input_ids=Data(1).ids(0)).logits
    if mesh.get_rank() == 0:
        autotp.shard(path, f"{path}/parts", tp=2, recipe=RECIPE)
    dist.barrier()
    found = []
    for directory, options in ((path, {"recipe": RECIPE}), (path, {"plan": plan}), (f"{path}/parts", {})):
        model = autotp.from_pretrained(directory, mesh, **options)
        close = torch.allclose(model.eval()(input_ids=Data(1).ids(0)).logits, wanted, atol=1e-5)
        held = model.model.layers[0].mlp.experts.down_proj.to_local()
        rank = mesh.get_local_rank("tp")
        found += [close, torch.equal(held, alone.model.layers[0].mlp.experts.down_proj[2 * rank : 2 * rank + 2])]  # type: ignore[union-attr]
    autotp.save_pretrained(model, f"{path}/back")
    dist.barrier()
    back = transformers.AutoModelForCausalLM.from_pretrained(f"{path}/back").state_dict()
    return [*found, apart(alone.state_dict(), back) == 0.0]


@pytest.mark.sweep
def test_loaded(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(loaded, str(tmp_path)) == [[True] * 7] * 2


def compiled() -> float:
    """The graph breaks at the experts: how many pairs a rank has is not known before."""
    alone, ids = build(5), Data(1).ids(0)
    quick: Any = torch.compile(parallel(alone, 1, 2), backend="aot_eager")
    for m in (alone, quick):
        loss_of(m, ids).backward()
    return apart(grads_of(alone), autotp.full_grads(quick._orig_mod))


@pytest.mark.sweep
def test_compiled(pool: Pool) -> None:
    assert max(pool.run(compiled)) <= 1e-9


def adapted() -> float:
    """A model that is planned again, because adapters came, keeps its experts where they are."""
    peft = pytest.importorskip("peft")
    alone, ids = build(5), Data(1).ids(0)
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    models = []
    for m in (alone, autotp.parallelize(copy.deepcopy(alone), mesh_of(1, 2), experts="whole", check="graph")):
        torch.manual_seed(0)
        models.append(peft.get_peft_model(m, config))
    losses = [loss_of(m, ids) for m in models]
    assert len(whole_experts(autotp.plan_of(models[1].base_model.model))) == 2
    return float((losses[0] - losses[1]).abs())


@pytest.mark.sweep
def test_with_adapters(pool: Pool) -> None:
    assert max(pool.run(adapted)) <= 1e-9


def test_the_plan_says_so() -> None:
    torch.manual_seed(0)
    model, given = Model(number=5), {"tp": 2, "check": "graph", "example_inputs": inputs()}
    width, whole = autotp.plan(model, **given), autotp.plan(model, **given, experts="whole")
    assert whole_experts(whole) == ("blocks.0.experts", "blocks.1.experts") and not whole_experts(width)
    assert whole.params["blocks.0.experts.down"].layout.local_shape == (3, HIDDEN, WIDTH)
    assert "its experts are whole" in whole.explain("blocks.0.experts")
    assert any("5 experts are dealt whole, 3 to a rank" in note for note in whole.notes)
    assert whole.to_dict()["modules"][1]["pairs"] == {"tokens": "x", "experts": "index", "weights": "weights"}
    assert whole.collectives() == width.collectives()  # the same sums of the same bytes
    assert autotp.Recipe.from_plan(whole).to_plan() == whole
    pinned, plain = autotp.Recipe.from_plan(whole), autotp.Recipe.from_plan(whole, pin=False)
    for recipe in (pinned, plain, RECIPE):
        assert whole_experts(autotp.plan(model, **given, recipe=recipe)) == whole_experts(whole)
    with pytest.raises(PlanError, match="dealt whole"):
        whole.to_tp_plan()
    with pytest.raises(PlanError, match="dealt whole"):
        whole.to_parallelize_module()
