"""What a parallel transformers model answers, and where the answers may not appear."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp import api
from tests.integrations.subjects import furthest, llama, subject, whole


def answers(tp: int) -> dict[str, Any]:
    model, _ = subject("llama", tp)
    config = model.config.distributed_config
    return {
        "tp": (model.tp_size, config.tp_size, model._device_mesh.mesh_dim_names, model._device_mesh.size()),
        "fsdp": (config.fsdp_size, config.dp_replicate_size, config.dp_size, config.tp_plan),
        "loaded": model.is_distributed_loading_by_transformers,
        "inside": all(m.config is model.config for m in model.modules() if "config" in vars(m)),
    }


def test_answers(pool):
    for found in pool.run(answers, 2, world=2):
        assert found == {"tp": (2, 2, ("tp",), 2), "fsdp": (1, 1, 1, {}), "loaded": True, "inside": True}
    for found in pool.run(answers, 2, world=4):
        assert found == {"tp": (2, 2, ("tp",), 2), "fsdp": (2, 1, 2, {}), "loaded": True, "inside": True}


def leaks(folder: str) -> list[str]:
    """Where the answers are that they should not be."""
    wrong = []
    model, _ = subject("llama", 2)
    config = model.config
    config.to_json_file(f"{folder}/{dist.get_rank()}.json")
    model.save_pretrained(f"{folder}/model")
    files = (Path(folder) / f"{dist.get_rank()}.json", Path(folder) / "model" / "config.json")
    texts = [*(path.read_text() for path in files), config.to_json_string()]
    wrong += [text for text in texts if "distributed" in text or "tp_size" in text]
    copies = (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), type(config).from_dict(config.to_dict()))
    wrong += ["a copy of the config" for copied in copies if getattr(copied, "distributed_config", None) is not None]
    if config.distributed_config.tp_size != 2:
        wrong.append("the answer is gone")
    twin = copy.deepcopy(model)  # is parallel too
    if (
        twin.config.distributed_config.tp_size != 2
        or twin.config.distributed_config._of() is not twin
        or twin.save_pretrained._model is not twin
    ):
        wrong.append("a copy of the model")
    twin.save_pretrained(f"{folder}/twin")
    again = type(model).from_pretrained(f"{folder}/twin", dtype=model.dtype)
    if furthest(whole(again, None), whole(model, 2)):
        wrong.append("the weights of a copy")
    whole_model = type(model)(config)  # of the same config
    if dist.get_rank() == 0:
        type(model)(copy.deepcopy(config)).save_pretrained(f"{folder}/alone")  # does not wait for others
    if whole_model.tp_size is not None:
        wrong.append("another model")
    return wrong


def test_files_and_copies_are_free_of_them(pool, tmp_path):
    assert pool.run(leaks, str(tmp_path), world=2) == [[], []]


def shared(folder: str) -> list[str]:
    """A whole model of the config object that the parallel one was made of is saved by one rank alone."""
    model = llama()
    other = type(model)(model.config)
    autotp.parallelize(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), check="graph")
    if dist.get_rank() == 0:
        other.save_pretrained(folder)
    return [name for name in ("distributed_config",) if getattr(other.config, name, None) is not None]


def test_a_config_that_two_models_share(pool, tmp_path):
    assert pool.run(shared, str(tmp_path), world=2, timeout=60) == [[], []]


def undone() -> bool:
    """Whether a model is as it was where making it parallel fails at its end."""
    model = llama()
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    config = model.config

    def fail(*_: Any) -> None:
        raise autotp.AutoTPError("at the end")

    api.ANSWERS.append(fail)
    try:
        autotp.parallelize(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), check="graph")
    except autotp.AutoTPError:
        pass
    finally:
        api.ANSWERS.remove(fail)
    after = {path: dict(vars(module)) for path, module in model.named_modules()}
    same = all(before[path].keys() == after[path].keys() for path in before) and model.config is config
    return same and not model._forward_pre_hooks and not hasattr(config, "distributed_config") and model.tp_size is None


def test_a_failure_leaves_none(pool):
    assert pool.run(undone, world=2) == [True, True]


def test_one_device_has_none():
    model = llama()
    with pytest.raises(AttributeError):
        _ = model.config.distributed_config
    assert model.tp_size is None
