"""The one place where accelerate's check of devices is lifted, so that its real code for tensor parallelism runs on CPUs.

`Accelerator.multi_device` is False for several CPUs, and `ParallelismConfig` refuses then. Nothing else is changed: accelerate, Trainer
and trl deal data, clip and save as they do on GPUs. What only GPUs show is in docs/accelerate.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch.distributed as dist


@contextmanager
def several_devices() -> Iterator[None]:
    """As `torchrun` starts a process, with accelerate taking CPUs for devices; its state begins and ends with the block."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    rank, world = str(dist.get_rank()), str(dist.get_world_size())
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "LOCAL_WORLD_SIZE": world,
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "0",
    }
    states: tuple[Any, ...] = (AcceleratorState, GradientState, PartialState)
    for state in states:
        state._reset_state()
    try:
        with (
            mock.patch.dict(os.environ, names),
            mock.patch.object(Accelerator, "multi_device", property(lambda self: self.use_distributed)),
        ):
            yield
    finally:
        for state in states:
            state._reset_state()
