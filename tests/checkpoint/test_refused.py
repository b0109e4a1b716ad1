"""What does not fit, and what breaks: one clear error on every rank, and nothing was changed where that can be known before."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autotp
from autotp.checkpoint import storage
from autotp.checkpoint.contents import local_of
from autotp.checkpoint.state import load, save
from autotp.errors import CheckpointError, PlanError
from benchmarks.optimizers import build
from tests.checkpoint.training import OPTIMIZERS, apart, grouped, mesh_of, parallel, train
from tests.support.ranks import Pool, RankError, Ranks


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    states = [v for p in model.parameters() for v in optimizer.state.get(p, {}).values()]
    return [local_of(t).clone() for t in [*model.parameters(), *model.buffers(), *states]]


def trained(kind: str = "even", optimizer: str = "AdamW") -> tuple[nn.Module, torch.optim.Optimizer]:
    model = parallel(kind, 2)
    made = OPTIMIZERS[optimizer](grouped(model))
    train(model, made, range(1))
    return model, made


class Factored(torch.optim.Optimizer):
    """With a factor of each matrix, one for every row: Adafactor's idea."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["rows"] = local_of(p).new_ones(p.shape[:1])


def wrong(folder: str) -> dict[str, str]:
    """Case → the error; each load into a model and an optimizer that must come out as they were."""
    model, optimizer = trained()
    good = f"{folder}/good"
    save(model, optimizer, good)
    before, found = snapshot(model, optimizer), {}

    def case(name: str, work: Callable[[], object], *, same: bool = True) -> None:
        dist.barrier()
        try:
            work()
            found[name] = "no error"
        except CheckpointError as error:
            found[name] = str(error)
        if same:
            assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True)), name

    def spoilt(name: str, spoil: Callable[[Path], object]) -> str:
        target = Path(folder) / name
        if dist.get_rank() == 0:
            shutil.copytree(good, target)
            spoil(target)
        dist.barrier()
        return str(target)

    case("nothing there", lambda: load(model, optimizer, f"{folder}/nowhere"))
    case("no index", lambda: load(model, optimizer, spoilt("noindex", lambda f: (f / ".metadata").unlink())))
    case("index cut", lambda: load(model, optimizer, spoilt("cut", lambda f: os.truncate(f / ".metadata", 999))))
    case("file missing", lambda: load(model, optimizer, spoilt("missing", lambda f: (f / "__1_0.distcp").unlink())))
    case("file cut", lambda: load(model, optimizer, spoilt("short", lambda f: os.truncate(f / "__1_0.distcp", 5000))))
    case("byte flipped", lambda: load(model, optimizer, spoilt("flipped", flip)), same=False)
    load(model, optimizer, good)
    assert all(torch.equal(a, b) for a, b in zip(before, snapshot(model, optimizer), strict=True))
    other, theirs = trained("padded")
    case("another model", lambda: load(other, theirs, good))
    case("another optimizer", lambda: load(model, OPTIMIZERS["SGD"](grouped(model)), good))
    case("other groups", lambda: load(model, OPTIMIZERS["AdamW"](model.parameters()), good))
    moved = grouped(model)
    moved[0]["params"].append(moved[1]["params"].pop())
    case("moved", lambda: load(model, OPTIMIZERS["AdamW"](moved), good))
    amsgrad = OPTIMIZERS["fused"](grouped(model))
    train(model, amsgrad, range(1))
    before = snapshot(model, optimizer)
    case("other state", lambda: load(model, amsgrad, good))
    single = parallel("even", 2).float()
    case("other dtype", lambda: load(single, None, good))
    extra = parallel("even", 2)
    extra.register_buffer("more", torch.zeros(1))
    case("more in the model", lambda: load(extra, None, good))
    save(extra, None, f"{folder}/more")
    case("less in the model", lambda: load(model, None, f"{folder}/more"))
    save(model, None, f"{folder}/alone")
    case("no optimizer in it", lambda: load(model, optimizer, f"{folder}/alone"))
    case("factors", lambda: save(model, Factored(model.parameters()), good))
    case("made before", lambda: save(model, OPTIMIZERS["AdamW"](build("even").parameters()), good))
    case("other paths", lambda: save(model, optimizer, f"{folder}/rank{dist.get_rank()}"))
    if dist.get_rank() == 1:
        optimizer.param_groups[0]["lr"] = 0.5
    case("other rates", lambda: save(model, optimizer, good))
    optimizer.param_groups[0]["lr"] = 1e-2
    if dist.get_rank() == 1:
        storage._Writer.write_data, kept = full_disk, storage._Writer.write_data  # type: ignore[method-assign, assignment]
    case("disk full", lambda: save(model, optimizer, good))
    if dist.get_rank() == 1:
        storage._Writer.write_data = kept  # type: ignore[method-assign]
    load(model, optimizer, good)
    try:
        save(build("even"), None, good)
    except PlanError as error:
        found["not parallel"] = str(error)
    assert sorted(Path(folder).glob(".*")) == []  # nothing half written is left
    return found


def flip(folder: Path) -> None:
    """One bit of a weight."""
    at = next(p for i, p in storage.read_index(folder).storage_data.items() if i.fqn == "model.model.layers.1.mlp.up_proj.weight")
    file = folder / at.relative_path
    data = bytearray(file.read_bytes())
    data[at.offset + at.length // 2] ^= 1
    file.write_bytes(data)


def full_disk(self: Any, plan: Any, planner: Any) -> Any:
    raise OSError(28, "No space left on device")


WORDS = {
    "nothing there": "no such folder",
    "no index": "no .metadata",
    "index cut": "damaged",
    "file missing": "__1_0.distcp is missing",
    "file cut": "__1_0.distcp is 5000 bytes long",
    "byte flipped": "checksum",
    "another model": "model.embed_tokens.weight was saved in shape (64, 48), here it has (63, 48)",
    "another optimizer": "group 0 was saved with amsgrad, betas, capturable, decoupled_weight_decay and 1 more",
    "other groups": "2 parameter groups, the optimizer 1",
    "moved": "group 0 of the optimizer has model.norm.weight",
    "other state": "max_exp_avg_sq",
    "other dtype": "was saved as torch.float64, here it is torch.float32",
    "more in the model": "more is not in the checkpoint",
    "less in the model": "the checkpoint has more, the model has not",
    "no optimizer in it": "load(model, None, path)",
    "factors": "state 'rows' of model.embed_tokens.weight",
    "made before": "make the optimizer after parallelize",
    "other paths": "the path of rank 1",
    "other rates": "the parameter groups of rank 1",
    "disk full": "on rank 1: OSError: [Errno 28] No space left",
    "not parallel": "autotp.parallelize",
}


def test_what_does_not_fit(pool: Pool, tmp_path: Path) -> None:
    ranks = pool.run(wrong, str(tmp_path))
    assert ranks[0] == ranks[1]
    for name, text in ranks[0].items():
        print(f"-- {name}: {text}")
    assert set(ranks[0]) == set(WORDS)
    assert {name: WORDS[name] for name, text in ranks[0].items() if WORDS[name] not in text} == {}


def killed(folder: str) -> None:
    """Rank 1 is killed while it writes; the others say what they were told, and live on."""
    mesh_of(3)
    model = parallel("even", 3)
    optimizer = OPTIMIZERS["AdamW"](grouped(model))
    save(model, optimizer, f"{folder}/state")
    train(model, optimizer, range(1))
    if dist.get_rank() == 1:
        storage._SavePlanner.lookup_object = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign, assignment]
    try:
        save(model, optimizer, f"{folder}/state")
    except CheckpointError as error:
        Path(folder, f"rank{dist.get_rank()}").write_text(str(error))


def reload(folder: str) -> tuple[bool, float]:
    model = parallel("even", 3, fresh=True)
    optimizer = OPTIMIZERS["AdamW"](grouped(model))
    load(model, optimizer, folder)
    full = autotp.full_state_dict(model)
    return bool(optimizer.state), apart({n: p.detach() for n, p in build("even").named_parameters()}, full)


def test_a_rank_killed_mid_save_leaves_the_old_one(tmp_path: Path) -> None:
    ranks = Ranks(3, grace=15)
    try:
        with pytest.raises(RankError, match="rank 1:\nthe process died") as found:
            ranks.run(killed, str(tmp_path))
        assert "did not finish" not in str(found.value)  # the others had their error at once
        for rank in (0, 2):
            assert "another rank may be gone" in (tmp_path / f"rank{rank}").read_text()
        assert ranks.run(reload, str(tmp_path / "state")) == [(False, 0.0)] * 3  # the one before, which had no step
    finally:
        ranks.stop()


@pytest.mark.parametrize("call", [autotp.checkpoint.save, autotp.checkpoint.load])
def test_arguments_in_the_wrong_order(call: Callable[..., None]) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(autotp.AutoTPError, match=r"path is SGD, wanted a folder: save\(model, optimizer, path\)"):
        call(model, "folder", torch.optim.SGD(model.parameters(), lr=0.1))
