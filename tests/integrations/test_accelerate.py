"""accelerate prepares a parallel model, its optimizer, data and schedule as on one device, or an error says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import autotp
from tests.integrations.lifted import several_devices
from tests.integrations.subjects import Recording, Rows, furthest, subject, whole
from tests.support.slow import swept

pytestmark = [pytest.mark.timeout(240), pytest.mark.filterwarnings("ignore")]


def prepared(
    name: str, tp: int | None, *, split: bool = True, shard: bool = True, told: bool = True, once: bool = False, **more: Any
) -> Any:
    """An Accelerator, what it prepared in one call, and the collator."""
    from accelerate import Accelerator, DataLoaderConfiguration, ParallelismConfig

    model, _ = subject(name, tp, shard=shard)
    collate = Recording()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    shuffled = torch.Generator().manual_seed(5)
    size = 4 if split or tp is None else 4 // (dist.get_world_size() // tp)
    loader = DataLoader(Rows(full=True), batch_size=size, shuffle=True, generator=shuffled, collate_fn=collate)
    if tp is not None and told:
        more["parallelism_config"] = ParallelismConfig(tp_size=tp, dp_shard_size=dist.get_world_size() // tp)
    more["dataloader_config"] = DataLoaderConfiguration(split_batches=split)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, step_scheduler_with_optimizer=not once, **more)
    return accelerator, accelerator.prepare(model, optimizer, loader, schedule), collate


def loop(accelerator: Any, everything: Any, once: bool = False) -> dict[str, Any]:
    """An epoch of three steps of two batches."""
    model, optimizer, loader, schedule = everything
    found: dict[str, Any] = {"losses": [], "norms": [], "rates": []}
    model.train()
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                found["norms"].append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
                found["rates"].append(schedule.get_last_lr()[0])
            optimizer.step()
            if accelerator.sync_gradients or not once:
                schedule.step()
            optimizer.zero_grad()
        found["losses"].append(accelerator.reduce(loss.detach(), "mean").item())
    return found


def trained(name: str, tp: int | None, once: bool = False, split: bool = True) -> dict[str, Any]:
    if tp is None:
        return _trained(name, None, once, split)
    with several_devices():
        return _trained(name, tp, once, split)


def _trained(name: str, tp: int | None, once: bool, split: bool) -> dict[str, Any]:
    accelerator, everything, collate = prepared(name, tp, split=split, once=once)
    found = loop(accelerator, everything, once)
    return found | {"weights": whole(accelerator.unwrap_model(everything[0]), tp), "batches": collate.seen}


def same(result: dict[str, Any], wanted: dict[str, Any]) -> None:
    """accelerate makes losses float32."""
    assert result["losses"] == pytest.approx(wanted["losses"], rel=2e-6)
    assert result["norms"] == pytest.approx(wanted["norms"], rel=2e-6)
    assert result["rates"] == wanted["rates"]
    assert furthest(result["weights"], wanted["weights"]) < 1e-6


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: trained(name, None) for name in ("llama", "gpt2")}


@pytest.mark.parametrize(
    ("name", "world", "once", "split"),
    swept(
        [("llama", 2, False, True), ("gpt2", 2, True, False), ("llama", 4, False, True), ("gpt2", 4, False, True)],
        ("gpt2", 2, True, False),
        ("llama", 4, False, True),
    ),
)
def test_everything_is_prepared_in_one_call(pool, alone, name, world, once, split):
    results = pool.run(trained, name, 2, once, split, world=world)
    for result in results:
        same(result, alone[name])
    batches = [result["batches"] for result in results]
    assert batches[0] == batches[1]
    if world == 4:
        assert batches[2] == batches[3] != batches[0]


def said(work: Any) -> str:
    try:
        work()
    except (autotp.AutoTPError, ValueError) as error:
        dist.barrier()
        return f"{type(error).__name__}: {error}"
    return "nothing"


def refusals() -> dict[str, str]:
    """What is said in place of another training than one device's."""
    from accelerate import Accelerator

    found = {}
    cases: dict[str, dict[str, Any]] = {
        "scheduler": {"split": False}, "gradients": {"shard": False}, "told": {"told": False},
    }  # fmt: skip
    for case, options in cases.items():
        with several_devices():
            try:
                accelerator, everything, _ = prepared("llama", 2, **options)
            except ValueError as error:
                found[case] = f"ValueError: {error}"
                continue
            found[case] = said(lambda accelerator=accelerator, everything=everything: loop(accelerator, everything))
    with several_devices():  # without a ParallelismConfig, the model left to autotp
        model, _ = subject("llama", 2)
        accelerator = Accelerator(cpu=True)
        model = accelerator.prepare_model(model, evaluation_mode=True)
        loader = accelerator.prepare(DataLoader(Rows(), batch_size=2))
        found["dealt"] = said(lambda: model.train()(**next(iter(loader))))
        numbers = torch.full((1, 4, 48), float(dist.get_rank())).double()  # of which only the shape is compared
        found["numbers"] = said(lambda: model.train()(inputs_embeds=numbers))
        with accelerator.split_between_processes(list(range(8))) as part:
            ids = torch.tensor([part])
            found["split"] = said(lambda: model.eval()(input_ids=ids))
    return found


@pytest.mark.parametrize("world", swept([2, 4], 4))
def test_refused(pool, world):
    for found in pool.run(refusals, world=world):
        assert f"would step the scheduler {world} times a step" in found["scheduler"]
        if world == 4:
            assert "2 data-parallel ranks, but the model is sharded over 1" in found["gradients"]
        else:
            assert found["gradients"] == "nothing"  # there are none to average
        assert found["told"].startswith("ValueError: Your model contains `DTensor` parameters")
        assert "called with different inputs on different ranks" in found["dealt"]
        assert f"accelerate deals batches to {world} ranks, but 2 of them are one tensor-parallel group" in found["numbers"]
        assert "called with different inputs on different ranks" in found["split"]


def states(folder: str) -> list[str]:
    """What save_state and load_state say; then a state by autotp, resumed."""
    with several_devices():
        accelerator, everything, _ = prepared("llama", 2)
        loop(accelerator, everything)
        found = [said(lambda: accelerator.save_state(f"{folder}/state"))]
        found.append(said(lambda: accelerator.load_state(folder)))
        model, optimizer, _, _ = everything
        autotp.checkpoint.save(model, optimizer, f"{folder}/right")
        model.save_pretrained(f"{folder}/model", is_main_process=accelerator.is_main_process, save_function=accelerator.save)
        wanted = whole(model, 2)
    with several_devices():
        accelerator, everything, _ = prepared("llama", 2)
        autotp.checkpoint.load(everything[0], everything[1], f"{folder}/right")
        found.append(str(furthest(whole(everything[0], 2), wanted)))
    return found


def test_state(pool, tmp_path):
    for save, load, distance in pool.run(states, str(tmp_path), world=2):
        assert "autotp.checkpoint.save(model, optimizer, path)" in save
        assert "autotp.checkpoint.load(model, optimizer, path)" in load
        assert distance == "0.0"
    assert not list(Path(tmp_path / "state").glob("*"))
    assert (tmp_path / "model" / "model.safetensors").exists()
