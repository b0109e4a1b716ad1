"""Checks what accelerate was told, when a model that it prepared is first trained.

accelerate counts processes, and takes each for a copy of the model with batches of its own unless its `ParallelismConfig` says
otherwise. Where that gives other results than one device, without an error of its own, there is one here:

- dataloaders are dealt to all processes, and not to tp groups;
- a scheduler steps once for each process, tp ranks too. accelerate never takes them out, so it must be told to step once;
- it has data-parallel ranks, and nobody averages their gradients;
- `save_state` writes one rank's part.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.distributed.device_mesh import DeviceMesh

from autotp.errors import AutoTPError
from autotp.integrations.transformers import data_parallel_sizes
from autotp.preflight import tp_mesh
from autotp.rewrite.undo import Undo


class Accelerated:
    """Forward pre-hook of the root: looks once, at the first call in training after an `Accelerator` was made."""

    def __init__(self, tp: int) -> None:
        self._tp, self._done = tp, False

    def __call__(self, model: nn.Module, args: Any) -> None:
        if self._done or not (model.training and torch.is_grad_enabled()) or is_dynamo_compiling():
            return
        accelerate = sys.modules.get("accelerate")
        if accelerate is None or not accelerate.state.AcceleratorState._shared_state:
            return
        self._done = True
        for accelerator in _accelerators(accelerate.Accelerator):
            if accelerator.num_processes > 1 and _is_for(accelerator, model):
                check(accelerator, model, self._tp)
                accelerator.register_save_state_pre_hook(_refuse_state)
                accelerator.register_load_state_pre_hook(_refuse_state)


def install_accelerate(model: nn.Module, mesh: DeviceMesh, undo: Undo) -> None:
    """Look at accelerate's settings when `model` is first trained; journalled in `undo`."""
    undo.push(model.register_forward_pre_hook(Accelerated(tp_mesh(mesh).size())).remove)


def check(accelerator: Any, model: nn.Module, tp: int) -> None:
    """Raise where `accelerator` would train another model than one device does.

    Raises:
        AutoTPError: names the setting.
    """
    config = accelerator.parallelism_config
    told = 1 if config is None else config.tp_size
    copies, shards = data_parallel_sizes(model)
    if accelerator._dataloaders and told != tp:
        raise AutoTPError(
            f"accelerate deals batches to {accelerator.num_processes // told} ranks, but {tp} of them are one tensor-parallel group and "
            f"need the same batch: Accelerator(parallelism_config=ParallelismConfig(tp_size={tp}, dp_shard_size="
            f"{max(1, accelerator.num_processes // tp)})), or leave the dataloader out of prepare"
        )
    if any(s.step_with_optimizer and not s.split_batches for s in accelerator._schedulers if _drives(s, model)):
        raise AutoTPError(
            f"accelerate would step the scheduler {accelerator.num_processes} times a step, once for each process, though {tp} of them "
            "are one tensor-parallel group: Accelerator(step_scheduler_with_optimizer=False), or dataloader_config="
            "DataLoaderConfiguration(split_batches=True), or leave the scheduler out of prepare"
        )
    data_parallel = 1 if config is None else config.dp_replicate_size * config.dp_shard_size
    if told == tp and data_parallel != copies * shards and any(m is model for m in accelerator._models):
        raise AutoTPError(
            f"accelerate has {data_parallel} data-parallel ranks, but the model is sharded over {copies * shards}, so nobody averages "
            "their gradients: call autotp.fully_shard(model, mesh) before prepare, and make the optimizer after it"
        )


def _refuse_state(*_: Any) -> None:
    """Raise in `save_state` and `load_state`: one rank writes its part of weights and moments, and all would read it as their own."""
    raise AutoTPError(
        "accelerate's save_state and load_state know one rank's part of weights and moments: call autotp.checkpoint.save(model, optimizer, "
        "path) and autotp.checkpoint.load(model, optimizer, path) on every rank, and keep schedule and random states beside it"
    )


def _accelerators(cls: type[Any]) -> Iterator[Any]:
    """Yields the objects of the class; accelerate keeps no list of them."""
    return (found for found in gc.get_objects() if issubclass(type(found), cls))


def _is_for(accelerator: Any, model: nn.Module) -> bool:
    return any(m is model for m in accelerator._models) or any(_steps(o, model) for o in accelerator._optimizers)


def _drives(scheduler: Any, model: nn.Module) -> bool:
    return any(_steps(optimizer, model) for optimizer in scheduler.optimizers)


def _steps(optimizer: Any, model: nn.Module) -> bool:
    own = {id(p) for p in model.parameters()}
    return any(id(p) in own for group in optimizer.param_groups for p in group["params"])
