"""Hidden states in token parts beside FSDP2, logits in parts, adapters, compiled code, autocast, recipes and checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import autotp
from autotp.api import parallelize_as
from autotp.plan.loss_parallel import logits_in_parts
from autotp.plan.sequence_parallel import tokens_in_parts
from benchmarks.activations import blocks, kept
from tests.composition.training import Data, adamw, apart, build, by_block, loss_of, mesh_of, train
from tests.support.collectives import noted
from tests.support.ranks import Pool
from tests.support.slow import swept, thinned

BOTH = {"sequence_parallel": True, "loss_parallel": True}
RECIPE = {"placements": BOTH}
KINDS = ("even", "padded", "tied", "fused", "joint", "experts")


def under_fsdp(kind: str, picked: bool) -> float:
    """Three clipped steps of AdamW beside one device with all batches; units by hand, or those that autotp picks."""
    mesh, alone = mesh_of(2, 2), build(kind)
    model = autotp.parallelize(copy.deepcopy(alone), mesh, check="graph", **BOTH)
    model = autotp.fully_shard(model, mesh) if picked else by_block(model, mesh)
    norms = train(model, adamw(model), Data.here(mesh), range(3))
    wanted = train(alone, adamw(alone), Data(2), range(3))
    return max(apart(alone.state_dict(), autotp.full_state_dict(model)), *(abs(a - b) for a, b in zip(norms, wanted, strict=True)))


@pytest.mark.parametrize(
    ("kind", "picked"),
    thinned([(k, p) for k in KINDS for p in (False, True)], [("fused", True), ("experts", False)], ("padded", False), ("joint", True)),
)
def test_under_fsdp(pool: Pool, kind: str, picked: bool) -> None:
    assert max(pool.run(under_fsdp, kind, picked, world=4)) <= 1e-9


def memory(dtype: torch.dtype) -> float:
    """Activation memory with tokens in parts over that without, of blocks of llama."""
    models = [autotp.parallelize(blocks(dtype), mesh_of(1, 4), check="graph", sequence_parallel=s) for s in (True, False)]
    parts, whole = (kept(m, 256) for m in models)
    return parts / whole


def test_activation_memory(pool: Pool) -> None:
    assert all(0.3 < share <= 0.6 for share in pool.run(memory, torch.float32, world=4))


def compiled(kind: str, parts: tuple[str, ...]) -> list[float]:
    """Code that is compiled all-reduces, and so does a model whose blocks are compiled, between breaks of their graphs too."""
    mesh, alone = mesh_of(1, 2), build(kind)
    wanted = loss_of(alone, Data(1).ids(0))
    wanted.backward()
    grads = {n: p.grad for n, p in alone.named_parameters()}
    found, ran = [], list[str]()
    for part in parts:
        model: Any = autotp.parallelize(copy.deepcopy(alone), mesh, sequence_parallel=True, experts="whole", check="graph")
        model.zero_grad()
        quick = model
        if part == "model":
            quick = torch.compile(model, backend="aot_eager")
        else:
            for layer in model.model.layers:
                layer.compile(backend="aot_eager")
        with noted(lambda comm, kind, tensor, nbytes: ran.append(kind)):
            loss_of(quick, Data(1).ids(0)).backward()
        assert not {"reduce_scatter", "all_to_all"} & set(ran)
        found.append(apart(grads, autotp.full_grads(model)))  # type: ignore[arg-type]
    return found


@pytest.mark.parametrize(("kind", "parts"), swept([("even", ("model", "blocks")), ("experts", ("blocks",))], ("experts", ("blocks",))))
def test_compiled(pool: Pool, kind: str, parts: tuple[str, ...]) -> None:
    assert max(max(found) for found in pool.run(compiled, kind, parts)) <= 1e-9


def adapted(by: str) -> float:
    """A model that is planned again, because adapters came, keeps its tokens in parts, whatever it has them from."""
    peft = pytest.importorskip("peft")
    mesh, alone = mesh_of(1, 2), build("even")
    given: dict[str, Any] = {"sequence_parallel": True} if by == "argument" else {"recipe": {"placements": {"sequence_parallel": True}}}
    if by == "plan":
        model = parallelize_as(copy.deepcopy(alone), mesh, autotp.plan(alone, tp=2, check="graph", sequence_parallel=True))
    else:
        model = autotp.parallelize(copy.deepcopy(alone), mesh, check="graph", **given)
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    models = []
    for m in (alone, model):
        torch.manual_seed(0)
        models.append(peft.get_peft_model(m, config))
    for m in models:
        loss_of(m, Data(1).ids(0)).backward()
    assert tokens_in_parts(autotp.plan_of(model))
    grads = [{n: p.grad for n, p in m.named_parameters() if p.grad is not None} for m in models]
    assert len(grads[0]) == len(grads[1]) > 0
    return max(float((grads[0][n] - t.full_tensor()).abs().max()) for n, t in grads[1].items())  # type: ignore[union-attr, operator]


@pytest.mark.parametrize("by", swept(["argument", "recipe", "plan"], "recipe"))
def test_with_adapters(pool: Pool, by: str) -> None:
    assert max(pool.run(adapted, by)) <= 1e-9


def in_autocast() -> float:
    """Under autocast the products are bfloat16's, as on one device."""
    mesh, alone = mesh_of(1, 2), build("even").float()
    model = autotp.parallelize(copy.deepcopy(alone), mesh, sequence_parallel=True, check="graph")
    with torch.autocast("cpu", torch.bfloat16):
        losses = [loss_of(m, Data(1).ids(0)) for m in (alone, model)]
    for loss in losses:
        loss.backward()
    grads = {n: p.grad for n, p in alone.named_parameters()}
    return max(float((losses[0] - losses[1]).abs()), apart(grads, autotp.full_grads(model)))  # type: ignore[arg-type]


def test_in_autocast(pool: Pool) -> None:
    assert max(pool.run(in_autocast)) <= 2e-2


def copied() -> list[bool]:
    """A copy of the model scatters too."""
    model: Any = autotp.parallelize(build("even"), mesh_of(1, 2), sequence_parallel=True, check="graph")
    found, logits = [], []
    for m in (model, copy.deepcopy(model)):
        ran: list[str] = []
        with noted(lambda comm, kind, given, nbytes, ran=ran: ran.append(kind)):  # type: ignore[misc]
            logits.append(m(input_ids=Data(1).ids(0)).logits)
        found.append(ran.count("reduce_scatter") == 5)
    return [*found, torch.equal(*logits)]


def test_a_copy(pool: Pool) -> None:
    assert pool.run(copied) == [[True] * 3] * 2


def loaded(path: str) -> list[bool]:
    """A recipe asks for it too: in `from_pretrained`, and in a plan that was made ahead."""
    mesh, alone = mesh_of(1, 2), build("tied")
    if mesh.get_rank() == 0:
        alone.save_pretrained(path)  # type: ignore[operator]
    torch.distributed.barrier()
    plan = autotp.plan(path, tp=2, check="graph", **BOTH)
    assert autotp.Recipe.from_plan(plan).to_plan() == plan and tokens_in_parts(plan) and logits_in_parts(plan)
    found = [autotp.from_pretrained(path, mesh, recipe=RECIPE), autotp.from_pretrained(path, mesh, plan=plan)]
    wanted = alone(input_ids=Data(1).ids(0)).logits
    return [torch.allclose(m(input_ids=Data(1).ids(0)).logits.full_tensor(), wanted) for m in found]


def test_loaded(pool: Pool, tmp_path: Path) -> None:
    assert pool.run(loaded, str(tmp_path)) == [[True, True]] * 2


def in_long_calls() -> list[int]:
    """ "auto" scatters where a sum is large; `least` stands for the size from which it does."""
    from dataclasses import replace

    from autotp.api import parallelize_as

    alone, mesh, counted = build("even"), mesh_of(1, 2), []
    plan = replace(autotp.plan(alone, tp=2, check="graph", sequence_parallel="auto"), least_scattered=20 * 32 * 8)
    model: Any = parallelize_as(alone, mesh, plan)
    for tokens in (19, 20):
        ran: list[str] = []
        with noted(lambda comm, kind, given, nbytes, ran=ran: ran.append(kind)):  # type: ignore[misc]
            model(input_ids=torch.arange(tokens).view(1, -1))
        counted.append(ran.count("reduce_scatter"))
    return counted


def test_auto(pool: Pool) -> None:
    assert pool.run(in_long_calls) == [[0, 5]] * 2
