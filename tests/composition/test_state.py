"""The state of a model over tp and FSDP: saved, loaded, read whole and written in the model's order, whatever writes or reads it."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_model_state_dict
from torch.distributed.tensor import DTensor

import autotp
from autotp.errors import AutoTPError, CheckpointError
from autotp.rewrite.parameters.data_parallel import DataParallelDTensor
from tests.composition.training import Data, adamw, apart, build, by_block, grads_of, mesh_of, parallel, same_on_all_ranks, sharded, train
from tests.support.ranks import Pool
from tests.support.slow import thinned

KINDS = ["even", "fused", "padded", "shared", "tied"]
WHOLE = StateDictOptions(full_state_dict=True)
Way = Callable[[str, str], Any]


def both(kind: str, steps: int = 2) -> tuple[nn.Module, Any, nn.Module, Any]:
    """A model over the mesh and one on one device, both trained alike, with their optimizers."""
    mesh = mesh_of(2, 2)
    model, alone = sharded(kind, mesh), build(kind)
    optimizer, other = adamw(model), adamw(alone)
    train(model, optimizer, Data.here(mesh), range(steps))
    train(alone, other, Data(2), range(steps))
    return model, optimizer, alone, other


def error(alone: nn.Module, model: nn.Module) -> float:
    """How far the weights are apart."""
    return apart(alone.state_dict(), autotp.full_state_dict(model))


def resumed(kind: str, path: str) -> float:
    """Saved in the middle of training, and loaded into others: on this mesh and on others, where training goes on."""
    model, optimizer, alone, other = both(kind)
    autotp.checkpoint.save(model, optimizer, f"{path}/state")
    worst = 0.0
    for shape in ((2, 2), (1, 4), (4, 1)):
        mesh = mesh_of(*shape)
        again = sharded(kind, mesh, seed=5)
        its = adamw(again)
        autotp.checkpoint.load(again, its, f"{path}/state")
        worst = max(worst, error(alone, again))
        one = copy.deepcopy(alone)
        ones = adamw(one)
        ones.load_state_dict(copy.deepcopy(other.state_dict()))
        data = Data.here(mesh)
        train(again, its, data, range(2, 3))
        train(one, ones, Data(data.of), range(2, 3))
        worst = max(worst, error(one, again))
    return worst


def by_dcp(kind: str, path: str) -> float:
    """torch.distributed.checkpoint alone, read back by parallel models and by one device."""
    model, optimizer, alone, _ = both(kind)
    states, optim = get_state_dict(model, optimizer)
    dcp.save({"model": states, "optim": optim}, checkpoint_id=f"{path}/dcp")
    again, one = sharded(kind, mesh_of(2, 2), seed=5), build(kind, seed=6).state_dict()
    dcp.load({"model": again.state_dict()}, checkpoint_id=f"{path}/dcp")
    dcp.load({"model": one}, checkpoint_id=f"{path}/dcp", no_dist=True)
    return max(error(alone, again), apart(alone.state_dict(), one))


def read_whole(kind: str, path: str) -> float:
    """torch's helper for whole states."""
    model, _, alone, _ = both(kind)
    found = [get_model_state_dict(model, options=WHOLE)]
    on_cpu = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        found.append(on_cpu)
    return max(apart(alone.state_dict(), each) for each in found)


def loaded(kind: str, path: str) -> float:
    """`load_state_dict` of whole tensors, of a parallel model's own, and by assignment; torch's helper for the own ones."""
    model, _, alone, _ = both(kind)
    worst = 0.0
    for assign in (False, True):
        again = sharded(kind, mesh_of(2, 2), seed=5)
        again.load_state_dict({n: t.clone() for n, t in alone.state_dict().items()}, assign=assign)
        if assign:
            again.tie_weights()  # assignment unties, as on one device
        worst = max(worst, error(alone, again))
        train(again, adamw(again), Data.here(mesh_of(2, 2)), range(1))  # FSDP has seen what was loaded
        one = copy.deepcopy(alone)
        train(one, adamw(one), Data(2), range(1))
        worst = max(worst, error(one, again))
    again.load_state_dict(model.state_dict())
    worst = max(worst, error(alone, again))
    again = sharded(kind, mesh_of(2, 2), seed=5)
    set_model_state_dict(again, get_model_state_dict(model))
    return max(worst, error(alone, again))


def files(kind: str, path: str) -> float:
    """`save_pretrained`, read by transformers, and by `from_pretrained` with FSDP after it, which trains on."""
    model, _, alone, _ = both(kind)
    autotp.save_pretrained(model, f"{path}/files")
    one: nn.Module = type(alone).from_pretrained(f"{path}/files", dtype=torch.float64)  # type: ignore[attr-defined]
    again = by_block(autotp.from_pretrained(f"{path}/files", mesh_of(2, 2), dtype=torch.float64).train(), mesh_of(2, 2))
    worst = max(apart(alone.state_dict(), one.state_dict()), error(alone, again))
    train(again, adamw(again), Data.here(mesh_of(2, 2)), range(1))
    train(one.train(), adamw(one), Data(2), range(1))
    alone_tp = sharded(kind, mesh_of(4, 1), seed=5)
    set_model_state_dict(alone_tp, alone.state_dict(), options=WHOLE)  # with one tp rank, parameters are FSDP's own DTensors
    autotp.save_pretrained(alone_tp, f"{path}/one tp rank")
    other: nn.Module = type(alone).from_pretrained(f"{path}/one tp rank", dtype=torch.float64)  # type: ignore[attr-defined]
    return max(worst, error(one, again), error(alone, alone_tp), apart(alone.state_dict(), other.state_dict()))


def arithmetic(kind: str, path: str) -> float:
    """Numbers of parameters, writes into them, and random ones."""
    model, _, alone, _ = both(kind, 1)
    one = dict(alone.named_parameters())
    worst = 0.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            q = one[name]
            for number in (
                torch.sum,
                torch.norm,
                torch.std,
                lambda t: t.mean(0),
                lambda t: t[:2],
                lambda t: t.abs().max(),
                lambda t: t[-1],
            ):
                got = number(p)
                whole = got.full_tensor() if isinstance(got, DTensor) else got
                worst = max(worst, float((whole - number(q)).abs().max()))
            for order in (1.0, 2.0, 3.0, float("inf")):
                worst = max(worst, abs(float(torch.linalg.vector_norm(p, order)) - float(torch.linalg.vector_norm(q, order))))
        for which in (model, alone):
            for p in which.parameters():
                p.mul_(2).add_(1)
                p[0] = 3
                p.clamp_(-2, 2.5)
                torch.nn.init.constant_(p[-1], 0.5)
    worst = max(worst, error(alone, model))
    torch.manual_seed(dist.get_rank())
    for p in model.parameters():
        nn.init.normal_(p)
    state = autotp.full_state_dict(model)
    if not same_on_all_ranks(sum(float(t.sum()) for t in state.values())):
        return float("inf")
    assert all(0.5 < float(t.std()) < 1.5 for t in state.values())
    return worst


def wrapped(kind: str, path: str) -> float:
    """Blocks in torch's wrappers: their names are in no key."""
    mesh = mesh_of(2, 2)
    model, alone = parallel(kind, mesh), build(kind)
    layers: Any = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    layers[0] = checkpoint_wrapper(layers[0])
    layers[1] = torch.compile(layers[1], backend="eager")
    by_block(model, mesh)
    optimizer, other = adamw(model), adamw(alone)
    train(model, optimizer, Data.here(mesh), range(2))
    train(alone, other, Data(2), range(2))
    worst = max(error(alone, model), apart(grads_of(alone), autotp.full_grads(model)))
    autotp.checkpoint.save(model, optimizer, f"{path}/state")
    autotp.save_pretrained(model, f"{path}/files")
    again = sharded(kind, mesh, seed=5)
    autotp.checkpoint.load(again, adamw(again), f"{path}/state")
    one: nn.Module = type(alone).from_pretrained(f"{path}/files", dtype=torch.float64)  # type: ignore[attr-defined]
    return max(worst, error(alone, again), apart(alone.state_dict(), one.state_dict()))


def evaluated(kind: str, path: str) -> float:
    """After a forward without a backward, FSDP holds gathered parameters of the root."""
    model, optimizer, alone, _ = both(kind, 1)
    uses: list[Callable[[], float]] = [
        lambda: error(alone, model),
        lambda: apart(grads_of(alone), autotp.full_grads(model)),
        lambda: autotp.save_pretrained(model, f"{path}/files") or 0.0,  # type: ignore[func-returns-value]
        lambda: autotp.checkpoint.save(model, optimizer, f"{path}/state") or 0.0,  # type: ignore[func-returns-value]
        lambda: autotp.checkpoint.load(model, optimizer, f"{path}/state") or error(alone, model),  # type: ignore[func-returns-value]
    ]
    worst = 0.0
    for use in uses:
        with torch.no_grad():
            model(input_ids=Data(1).ids(3))
        worst = max(worst, use())
    one: nn.Module = type(alone).from_pretrained(f"{path}/files", dtype=torch.float64)  # type: ignore[attr-defined]
    return max(worst, apart(alone.state_dict(), one.state_dict()))


def generated(kind: str, path: str) -> float:
    """Tokens of a model over tp and FSDP."""
    model, _, alone, _ = both(kind, 1)
    ids = Data(1).ids(3)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    tokens = [m.eval().generate(input_ids=ids, **options) for m in (model, alone)]  # type: ignore[operator]
    return 0.0 if torch.equal(*tokens) else 1.0


WAYS: dict[str, Way] = {
    way.__name__: way for way in (resumed, by_dcp, read_whole, loaded, files, arithmetic, generated, wrapped, evaluated)
}


def run(way: str, kind: str, path: str) -> float:
    """One way, with the messages of torch's own tools silent."""
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    return WAYS[way](kind, path)  # type: ignore[no-any-return]


PAIRS = [(way, kind) for way in WAYS for kind in KINDS]
OFTEN = [(way, kind) for way in WAYS for kind in (("fused", "padded") if way in ("resumed", "by_dcp", "loaded") else ("shared",))]
ALWAYS = [(way, kind) for way, kind in OFTEN if kind != ("padded" if way == "by_dcp" else "fused")]


@pytest.mark.parametrize(("way", "kind"), thinned(PAIRS, OFTEN, *ALWAYS))
def test_state(pool: Pool, tmp_path: Path, way: str, kind: str) -> None:
    errors = pool.run(run, way, kind, str(tmp_path), world=4)
    assert max(errors) <= 1e-9, errors


def told(path: str) -> dict[str, str]:
    """What cannot be done with it."""
    model, optimizer, alone, _ = both("fused", 1)
    uneven = sharded("padded", mesh_of(2, 2))
    whole = {n: t.clone() for n, t in alone.state_dict().items()}
    first = whole if dist.get_rank() == 0 else {}
    from_first = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    uses: dict[str, Callable[[], Any]] = {
        "cut by placements": lambda: set_model_state_dict(model, whole, options=WHOLE),
        "cut by placements on rank 0": lambda: set_model_state_dict(model, first, options=from_first),
        "cut by placements, uneven": lambda: set_model_state_dict(uneven, build("padded").state_dict(), options=WHOLE),
        "another model": lambda: autotp.checkpoint.load(uneven, None, f"{path}/state"),
        "no folder": lambda: autotp.save_pretrained(model, f"{path}/state/.metadata"),
    }
    autotp.checkpoint.save(model, optimizer, f"{path}/state")
    found = {}
    for name, use in uses.items():
        try:
            use()
            found[name] = "fine"
        except AutoTPError as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


def test_told(pool: Pool, tmp_path: Path) -> None:
    for found in pool.run(told, str(tmp_path), world=4):
        for name in ("cut by placements", "cut by placements on rank 0", "cut by placements, uneven"):
            assert "load whole tensors on every rank by model.load_state_dict" in found[name], found[name]
        assert found["another model"].startswith(CheckpointError.__name__)
        assert found["no folder"].startswith(CheckpointError.__name__)


def even_ones() -> float:
    """torch's helper cuts whole tensors by placements where parts are even slices."""
    alone = build("even", seed=3)
    whole = {n: t.clone() for n, t in alone.state_dict().items()}
    worst = 0.0
    for options in (WHOLE, StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)):
        model = sharded("even", mesh_of(2, 2))
        set_model_state_dict(model, {n: t.clone() for n, t in whole.items()}, options=options)
        worst = max(worst, error(alone, model))
    return worst


def test_even_parts_are_cut_by_placements(pool: Pool) -> None:
    assert max(pool.run(even_ones, world=4)) == 0.0


def kinds_of() -> bool:
    """What optimizers, users and torch hold are all laid out."""
    model, optimizer, _, _ = both("padded", 1)
    moments = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, Tensor) and v.ndim]
    return all(type(t) is DataParallelDTensor for t in (*model.parameters(), *(p.grad for p in model.parameters()), *moments))


def test_what_there_is_of_a_parameter_is_laid_out(pool: Pool) -> None:
    assert all(pool.run(kinds_of, world=4))
