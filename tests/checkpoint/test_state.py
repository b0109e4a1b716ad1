"""Training states that are saved at one tp and resumed at another give what was never interrupted."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.checkpoint.contents import local_of
from autotp.checkpoint.state import load, save
from autotp.checkpoint.storage import read_index
from benchmarks.optimizers import build
from tests.checkpoint.training import (
    OPTIMIZERS,
    apart,
    barrier,
    grouped,
    mesh_of,
    moments,
    parallel,
    plain_moments,
    train,
)
from tests.support.ranks import Pool
from tests.support.slow import swept

KINDS = ("even", "fused", "shared", "padded")
CHAIN = (2, 4, 3, 1)
STEPS = 2


def resumed(kind: str, optimizer: str, folder: str) -> list[dict[str, float]]:
    """Train at each tp of CHAIN after loading what the one before saved; errors against one uninterrupted device."""
    found = []
    reference = build(kind)
    whole = OPTIMIZERS[optimizer](grouped(reference))
    for i, tp in enumerate(CHAIN):
        mesh, steps = mesh_of(tp), range(i * STEPS, i * STEPS + STEPS)
        train(reference, whole, steps)
        if dist.get_rank() < tp:
            model = parallel(kind, tp, fresh=i > 0)
            mine = OPTIMIZERS[optimizer](grouped(model))
            group = mesh.get_group()
            if i:
                load(model, mine, f"{folder}/{i - 1}", group=group)
            train(model, mine, steps)
            save(model, mine, f"{folder}/{i}", group=group)
            full = {n: p.detach() for n, p in model.named_parameters()} if tp == 1 else autotp.full_state_dict(model)
            weights = {n: full[n] for n, _ in reference.named_parameters()}
            found.append(
                {
                    "weights": apart({n: p.detach() for n, p in reference.named_parameters()}, weights),
                    "moments": apart(plain_moments(reference, whole), moments(model, mine)),
                }
            )
        barrier()
    return found


@pytest.mark.parametrize("optimizer", ["AdamW", pytest.param("SGD", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", swept(KINDS, "fused"))
def test_resumed_at_other_tps(pool: Pool, tmp_path: Path, kind: str, optimizer: str) -> None:
    for rank in pool.run(resumed, kind, optimizer, str(tmp_path), world=4):
        assert all(error <= 1e-9 for errors in rank for error in errors.values()), rank


def wrong_order(kind: str, folder: str) -> float:
    """The control: what the same resuming gives if a rank's part is taken for the model's order, as an even `Shard` is."""
    mesh = mesh_of(2)
    if dist.get_rank() >= 2:
        return 1.0
    from torch.distributed.tensor import DTensor, Shard

    model = parallel(kind, 2)
    full = autotp.full_state_dict(model)
    worst = 0.0
    for name, p in model.named_parameters():
        layout = autotp.plan_of(model).params[name].layout
        if layout.dim is not None:
            even = DTensor.from_local(p._local_tensor.detach(), mesh, (Shard(layout.dim),), run_check=False).full_tensor()  # type: ignore[attr-defined]
            rows = even.narrow(layout.dim, 0, layout.shape[layout.dim])
            worst = max(worst, float((rows - full[name]).abs().max()))
    return worst


@pytest.mark.parametrize("kind", ["fused", "shared"])
def test_the_order_of_a_fused_weight_matters(pool: Pool, tmp_path: Path, kind: str) -> None:
    assert min(pool.run(wrong_order, kind, str(tmp_path), world=4)) > 1e-2


def plain_dcp(kind: str, folder: str) -> dict[str, float]:
    """torch.distributed.checkpoint alone, on one device: it reads what was saved at tp 2, and what it saves is read at tp 4."""
    tp2, tp4 = mesh_of(2), mesh_of(4)
    if dist.get_rank() < 2:
        model = parallel(kind, 2)
        mine = OPTIMIZERS["AdamW"](grouped(model))
        train(model, mine, range(2))
        save(model, mine, f"{folder}/a", group=tp2.get_group())
    barrier()
    alone = build(kind)
    optimizer = OPTIMIZERS["AdamW"](grouped(alone))
    train(alone, optimizer, range(2))
    wanted = {n: p.detach().clone() for n, p in alone.state_dict().items()}, plain_moments(alone, optimizer)
    found = {}
    if dist.get_rank() == 0:
        other = build(kind)
        theirs = OPTIMIZERS["AdamW"](grouped(other))
        states = get_optimizer_state_dict(other, theirs)
        state = {"model": other.state_dict(), "optimizer": states}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            dcp.load(state, checkpoint_id=f"{folder}/a", no_dist=True)
            other.load_state_dict(state["model"])
            set_optimizer_state_dict(other, theirs, state["optimizer"])
            found = {"model": apart(wanted[0], other.state_dict()), "moments": apart(wanted[1], plain_moments(other, theirs))}
            state = {"model": other.state_dict(), "optimizer": get_optimizer_state_dict(other, theirs)}
            dcp.save(state, checkpoint_id=f"{folder}/b", no_dist=True)
    barrier()
    model = parallel(kind, 4, fresh=True)
    mine = OPTIMIZERS["AdamW"](grouped(model))
    load(model, mine, f"{folder}/b", group=tp4.get_group())
    full = autotp.full_state_dict(model)
    return found | {"back": apart(wanted[0], full), "moments back": apart(wanted[1], moments(model, mine))}


@pytest.mark.parametrize("kind", swept(KINDS, "fused", "padded"))
def test_plain_dcp_reads_and_writes_the_same(pool: Pool, tmp_path: Path, kind: str) -> None:
    for errors in pool.run(plain_dcp, kind, str(tmp_path), world=4):
        assert all(error <= 1e-9 for error in errors.values()), errors


def details(folder: str) -> None:
    """Hyperparameters, frozen parameters, parameters without state, state that is there already, ties, padding, buffers."""
    mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))

    def made(fill: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = build("shared")  # its head is tied
        model.register_buffer("count", torch.arange(3) + fill)
        model.register_buffer("scratch", torch.ones(2), persistent=False)
        frozen = model.get_parameter("transformer.h.0.mlp.c_fc.weight")
        frozen.requires_grad_(False)
        if fill:
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.5)
        model = autotp.parallelize(model, mesh)
        assert autotp.plan_of(model).params["transformer.h.0.attn.c_attn.weight"].layout.is_shared
        return model, torch.optim.AdamW(grouped(model), lr=torch.tensor(1e-2, dtype=torch.float64), betas=(0.8, 0.9))

    model, optimizer = made(fill=False)
    train(model, optimizer, range(2))
    optimizer.param_groups[0]["lr"].fill_(0.007)
    optimizer.param_groups[1].update(lr=0.003, initial_lr=0.01, betas=(0.7, 0.95))
    unused = model.get_parameter("transformer.wpe.weight")
    del optimizer.state[unused]  # as of a parameter that never had a gradient
    save(model, optimizer, folder)
    if dist.get_rank() == 0:
        Path(folder, "notes.txt").write_text("mine")
    barrier()
    save(model, optimizer, folder)
    assert Path(folder, "notes.txt").read_text() == "mine"
    for stepped in (False, True):
        other, theirs = made(fill=True)
        rate = theirs.param_groups[0]["lr"]
        if stepped:
            train(other, theirs, range(5, 6))
        load(other, theirs, folder)
        assert theirs.param_groups[0]["lr"] is rate and float(rate) == 0.007
        assert theirs.param_groups[1]["lr"] == 0.003 and theirs.param_groups[1]["initial_lr"] == 0.01
        assert theirs.param_groups[1]["betas"] == (0.7, 0.95) and theirs.param_groups[0]["betas"] == (0.8, 0.9)
        params = dict(other.named_parameters())
        assert params["transformer.wpe.weight"] not in theirs.state
        assert params["transformer.h.0.mlp.c_fc.weight"] not in theirs.state
        assert not params["transformer.h.0.mlp.c_fc.weight"].requires_grad
        for name, p in model.named_parameters():
            assert torch.equal(p._local_tensor, params[name]._local_tensor), name  # type: ignore[attr-defined]
            for key, value in optimizer.state.get(p, {}).items():
                got = theirs.state[params[name]][key]
                assert type(got) is type(value) and got.dtype == value.dtype, (name, key)
                assert torch.equal(local_of(got), local_of(value)), (name, key)
        assert other.get_buffer("count").tolist() == [0, 1, 2]
        train(other, theirs, range(2, 3))
    index = read_index(Path(folder))
    assert {"model.lm_head.weight", "model.transformer.wte.weight", "model.count"} <= set(index.state_dict_metadata)
    assert "model.scratch" not in index.state_dict_metadata
    ties = [place for key, place in index.storage_data.items() if key.fqn in ("model.lm_head.weight", "model.transformer.wte.weight")]
    assert len({(place.relative_path, place.offset) for place in ties}) == len(ties) // 2  # written once


def test_details(pool: Pool, tmp_path: Path) -> None:
    pool.run(details, str(tmp_path / "state"), world=4)


def beside_data_parallel(folder: str) -> dict[str, float]:
    """A 2 × 2 mesh: each tp group has a copy, one of them is saved, all load."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    reference = build("shared")
    whole = OPTIMIZERS["AdamW"](grouped(reference))
    train(reference, whole, range(2))
    model = autotp.parallelize(build("shared"), mesh)
    mine = OPTIMIZERS["AdamW"](grouped(model))
    train(model, mine, range(2))
    save(model, mine, folder)
    other = autotp.parallelize(build("shared"), mesh)
    theirs = OPTIMIZERS["AdamW"](grouped(other))
    load(other, theirs, folder)
    boxes = [place for key, place in read_index(Path(folder)).storage_data.items() if key.fqn == "model.transformer.h.0.attn.c_attn.weight"]
    assert len(boxes) == 3  # queries of both ranks of a group, and the one head of keys and values: no box twice
    written = {place.relative_path for place in read_index(Path(folder)).storage_data.values()}
    assert len(written) == 4  # and all ranks share the writing
    full = autotp.full_state_dict(other)
    return {
        "weights": apart({n: p.detach() for n, p in reference.named_parameters()}, {n: full[n] for n, _ in reference.named_parameters()}),
        "moments": apart(plain_moments(reference, whole), moments(other, theirs)),
    }


@pytest.mark.sweep
def test_one_copy_is_saved_of_a_mesh_with_more_dims(pool: Pool, tmp_path: Path) -> None:
    for errors in pool.run(beside_data_parallel, str(tmp_path / "state"), world=4):
        assert all(error <= 1e-9 for error in errors.values()), errors


def in_bfloat16(folder: str) -> None:
    """Parameters and moments in bfloat16, the optimizer wrapped by accelerate; bit for bit, at another tp."""
    from accelerate import Accelerator

    tp2, tp3 = mesh_of(2), mesh_of(3)
    wrap = Accelerator(cpu=True).prepare_optimizer
    bits: dict[str, Tensor] = {}
    if dist.get_rank() < 2:
        model = autotp.parallelize(build("fused").bfloat16(), tp2)
        optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=1e-2), device_placement=False)
        model(input_ids=torch.arange(8).view(1, 8), labels=torch.arange(8).view(1, 8)).loss.backward()
        optimizer.step()
        save(model, optimizer, folder, group=tp2.get_group())
        bits = autotp.full_state_dict(model) | moments(model, optimizer)
        assert bits["transformer.wte.weight"].dtype == bits["transformer.wte.weight.exp_avg"].dtype == torch.bfloat16
    parcel = [bits]
    dist.broadcast_object_list(parcel, src=0)
    if dist.get_rank() < 3:
        other = autotp.parallelize(build("fused").bfloat16(), tp3)
        theirs = wrap(torch.optim.AdamW(other.parameters(), lr=0.5), device_placement=False)
        load(other, theirs, folder, group=tp3.get_group())
        got = autotp.full_state_dict(other) | moments(other, theirs)
        assert set(got) == set(parcel[0]) and all(
            torch.equal(got[n], parcel[0][n]) and got[n].dtype == t.dtype for n, t in parcel[0].items()
        )
        assert theirs.param_groups[0]["lr"] == 1e-2
    barrier()


def test_bfloat16_and_accelerate(pool: Pool, tmp_path: Path) -> None:
    pool.run(in_bfloat16, str(tmp_path / "state"), world=4)


def of_whole_parameters(folder: str) -> None:
    """State of any shape is fine for what every rank holds whole; it is made where the optimizer has not made it."""
    model = parallel("fused", 2)
    p = model.get_parameter("transformer.wpe.weight")

    def made() -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD([p], lr=0.1)
        optimizer.state[p] = {"rows": torch.arange(32.0), "kept": 3, "name": "x"}
        return optimizer

    optimizer = made()
    save(model, optimizer, folder)
    theirs = made()
    for state in ({}, {"rows": torch.zeros(32), "kept": 0, "name": ""}):
        theirs.state[p] = state
        load(model, theirs, folder)
        assert torch.equal(local_of(theirs.state[p]["rows"]), torch.arange(32.0))
        assert theirs.state[p]["kept"] == 3 and theirs.state[p]["name"] == "x"


def test_state_of_whole_parameters(pool: Pool, tmp_path: Path) -> None:
    pool.run(of_whole_parameters, str(tmp_path / "state"))
