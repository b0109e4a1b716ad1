"""torch.distributed.checkpoint alone on parallel models: the model's order, or a clear error. Never another order."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

import autotp
from autotp.checkpoint.state import save
from autotp.errors import AutoTPError
from autotp.rewrite.parameters.dtensor_operators import dispatch
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from benchmarks.optimizers import build
from tests.checkpoint.training import OPTIMIZERS, apart, barrier, grouped, mesh_of, moments, parallel, plain_moments, train
from tests.support.ranks import Pool
from tests.support.slow import few, in_turns

State = Callable[[nn.Module, torch.optim.Optimizer], dict[str, Any]]


def by_hand(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model.state_dict(), "optim": optimizer.state_dict()}


def by_torch(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    states, optim = get_state_dict(model, optimizer)
    return {"model": states, "optim": optim}


def as_dtensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The control: the same tensors, without their layouts."""
    state = by_hand(model, optimizer)
    state["model"] = {n: t._plain() if isinstance(t, DTensor) else t for n, t in state["model"].items()}
    return state


STATES: dict[str, State] = {"by hand": by_hand, "by torch": by_torch, "control": as_dtensors}


def wanted(kind: str, optimizer: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    alone = build(kind)
    whole = OPTIMIZERS[optimizer](grouped(alone))
    train(alone, whole, range(2))
    return {n: p.detach() for n, p in alone.state_dict().items()}, plain_moments(alone, whole)


def through_dcp(kind: str, how: str, folder: str, asynchronous: bool = False) -> dict[str, float]:
    """Saved at tp 2, loaded at tp 4."""
    tp2, tp4 = mesh_of(2), mesh_of(4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dist.get_rank() < 2:
            model = parallel(kind, 2)
            mine = OPTIMIZERS["SGD"](grouped(model))
            train(model, mine, range(2))
            state = STATES[how](model, mine)
            if asynchronous:
                dcp.async_save(state, checkpoint_id=folder, process_group=tp2.get_group()).result()  # type: ignore[union-attr]
            else:
                dcp.save(state, checkpoint_id=folder, process_group=tp2.get_group())
        barrier()
        other = parallel(kind, 4, fresh=True)
        theirs = OPTIMIZERS["SGD"](grouped(other))
        train(other, theirs, range(5, 6))  # so that there is state to load into
        state = STATES[how](other, theirs)
        dcp.load(state, checkpoint_id=folder, process_group=tp4.get_group())
        if how == "by torch":
            set_state_dict(other, theirs, model_state_dict=state["model"], optim_state_dict=state["optim"])
        else:
            other.load_state_dict(by_hand(other, theirs)["model"])  # loaded in place
            theirs.load_state_dict(state["optim"])
    weights, states = wanted(kind, "SGD")
    return {"weights": apart(weights, autotp.full_state_dict(other)), "moments": apart(states, moments(other, theirs))}


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *in_turns(("fused", "padded"), ("by hand", "by torch")),
        *few((kind, how) for kind in ("even", "shared") for how in ("by hand", "by torch")),
    ],
)
def test_saved_and_loaded_at_another_tp(pool: Pool, tmp_path: Path, kind: str, how: str) -> None:
    for errors in pool.run(through_dcp, kind, how, str(tmp_path / "state"), world=4):
        assert all(error <= 1e-9 for error in errors.values()), errors


def test_saved_asynchronously(pool: Pool, tmp_path: Path) -> None:
    for errors in pool.run(through_dcp, "fused", "by hand", str(tmp_path / "state"), True, world=4):
        assert all(error <= 1e-9 for error in errors.values()), errors


def test_without_layouts_it_would_be_another_order(pool: Pool, tmp_path: Path) -> None:
    for errors in pool.run(through_dcp, "fused", "control", str(tmp_path / "state"), world=4):
        assert errors["weights"] > 1e-2 and errors["moments"] <= 1e-9, errors


def ours_by_dcp(kind: str, folder: str) -> float:
    """What autotp.checkpoint saved at tp 2, read by DCP at tp 4."""
    if dist.get_rank() < 2:
        save(parallel(kind, 2), None, folder, group=mesh_of(2).get_group())
    mesh_of(4)
    barrier()
    other = parallel(kind, 4, fresh=True)
    dcp.load({"model": other.state_dict()}, checkpoint_id=folder)
    return apart(dict(build(kind).state_dict()), autotp.full_state_dict(other))


@pytest.mark.parametrize("kind", few(["even", "fused", "shared", "padded"], "fused"))
def test_dcp_reads_what_autotp_saved(pool: Pool, tmp_path: Path, kind: str) -> None:
    assert set(pool.run(ours_by_dcp, kind, str(tmp_path / "state"), world=4)) == {0.0}


def whole_states(kind: str) -> dict[str, float]:
    """`full_state_dict=True`, `full_tensor()` and `redistribute` give the model's tensors, of moments and gradients too."""
    model = parallel(kind, 2)
    optimizer = OPTIMIZERS["SGD"](grouped(model))
    train(model, optimizer, range(2))
    weights, states = wanted(kind, "SGD")
    model_state, optim_state = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    got = {f"{n}.{k}": torch.as_tensor(v) for n, state in optim_state["state"].items() for k, v in state.items()}
    by_name = {n: optimizer.state[p]["momentum_buffer"] for n, p in model.named_parameters() if p in optimizer.state}
    file = io.BytesIO()
    torch.save(by_name, file)
    file.seek(0)
    again = torch.load(file)  # in the safe form, which knows layouts
    twins = {n: (t * 2).float().double().div_(2) for n, t in by_name.items()}
    return {
        "weights": apart(weights, model_state),
        "moments": apart(states, got),
        "full_tensor": apart(states, {f"{n}.momentum_buffer": t.full_tensor() for n, t in by_name.items()}),
        "loaded": apart(states, {f"{n}.momentum_buffer": t.full_tensor() for n, t in again.items()}),
        "computed": apart(states, {f"{n}.momentum_buffer": t.full_tensor() for n, t in twins.items()}) * 1e-4,
    }


@pytest.mark.parametrize("kind", few(["even", "fused", "shared", "padded"], "shared", "padded"))
def test_whole_states(pool: Pool, kind: str) -> None:
    for errors in pool.run(whole_states, kind):
        assert all(error <= 1e-9 for error in errors.values()), errors


def foreign(check: bool, from_rank_0: bool) -> str:
    """Whole weights into a parallel model through torch's helper, which cuts them as if they were even."""
    model, before = parallel("fused", 2), {n: p.detach().clone() for n, p in build("fused").state_dict().items()}
    wanted = {n: t * 2 for n, t in before.items()}
    given = {n: t.clone() for n, t in wanted.items()} if not from_rank_0 or dist.get_rank() == 0 else {}
    with pytest.MonkeyPatch.context() as patch:
        if not check:
            patch.setattr(dispatch, "known_order", lambda into, source: None)
            patch.setattr(LayoutDTensor, "placements", property(lambda self: self._spec.placements))
        try:
            set_model_state_dict(model, given, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=from_rank_0))
        except AutoTPError as error:
            return str(error)
    return f"{apart(wanted, autotp.full_state_dict(model))}"


@pytest.mark.parametrize("from_rank_0", [False, True])
def test_whole_weights_are_not_cut_in_another_order(pool: Pool, from_rank_0: bool) -> None:
    assert all("load whole tensors on every rank" in text for text in pool.run(foreign, True, from_rank_0))
    assert all(float(text) > 1e-2 for text in pool.run(foreign, False, from_rank_0))  # what it would have been


def own_state(kind: str) -> None:
    """A parallel model takes back its own state, and that of a copy."""
    model = parallel(kind, 2)
    state = {n: t.clone() for n, t in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    model.load_state_dict(state)
    assert apart(dict(build(kind).named_parameters()), {n: p.full_tensor() for n, p in model.named_parameters()}) == 0.0  # type: ignore[operator]
    assert apart(autotp.full_state_dict(model), get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))) == 0.0


@pytest.mark.parametrize("kind", ["fused", "shared"])
def test_its_own_state_is_taken_back(pool: Pool, kind: str) -> None:
    pool.run(own_state, kind)
