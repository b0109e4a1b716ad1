"""Makes random numbers agree: sampling draws the same token on every rank, replicated dropout the same mask.

Rank 0's generator states are broadcast before `generate`, and before a training forward of a model with active dropout: at the
root, or at the inner model, block or dropout where a call begins (`autotp.rewrite.entry`).
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.guards.same_inputs import compare_inputs, mode_of_environment
from autotp.rewrite.undo import Undo


def sync_rng(comm: Comm, device: torch.device) -> None:
    """Give every rank rank 0's generator state of the CPU and of `device`. Collective."""
    if comm.size == 1 or torch.compiler.is_dynamo_compiling() or device.type == "meta":
        return
    state = torch.get_rng_state()
    # A process group of GPUs cannot carry CPU tensors.
    torch.set_rng_state(comm.broadcast_(state.to(device)).cpu())
    if device.type != "cpu":
        module = torch.get_device_module(device)
        state = module.get_rng_state(device)
        module.set_rng_state(comm.broadcast_(state.to(device)).cpu(), device)


def device_of(model: nn.Module) -> torch.device:
    """Returns the device of the model's parameters (the CPU for a model without any)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class Deadline:
    """A stopping criterion of transformers: it ends a generation on every rank at the token at which rank 0's time is up."""

    def __init__(self, comm: Comm, seconds: float, device: torch.device) -> None:
        self._comm, self._device, self._end = comm, device, time.monotonic() + seconds

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Returns whether each row is done: [batch] truth values. Collective."""
        late = torch.tensor([time.monotonic() > self._end], dtype=torch.uint8, device=self._device)
        return self._comm.broadcast_(late).bool().expand(input_ids.shape[0])


#: Seconds that no generation takes: `max_time=None` would be filled up from the model's `generation_config`.
_NEVER = 1e9


class SyncedGenerate:
    """Replaces `model.generate`: it starts from rank 0's generator state, with the same arguments on all ranks.

    It looks like the original and survives deepcopy.
    """

    def __init__(self, model: nn.Module, comm: Comm) -> None:
        self._model, self._comm = model, comm
        self._compare = mode_of_environment() != "never"
        self._generate: Callable[..., Any] = model.generate  # type: ignore[assignment]
        functools.update_wrapper(self, self._generate)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        device = device_of(self._model)
        if self._compare and self._comm.size > 1 and device.type != "meta":
            compare_inputs(self._comm, f"{type(self._model).__name__}.generate", args, kwargs, device, self._model)
        sync_rng(self._comm, device)
        config = kwargs.get("generation_config") or (args[1] if len(args) > 1 else None)
        seconds = next((s for c in (config, self._own_config()) if (s := getattr(c, "max_time", None)) is not None), None)
        seconds = kwargs.get("max_time", seconds)
        if seconds is not None and self._comm.size > 1:
            own = Deadline(self._comm, seconds, device)
            kwargs |= {"max_time": _NEVER, "stopping_criteria": [*(kwargs.get("stopping_criteria") or ()), own]}
        return self._generate(*args, **kwargs)

    def _own_config(self) -> Any:
        return getattr(self._model, "generation_config", None)


class Dropouts:
    """Tells whether modules will draw dropout masks in training: dropout modules, and modules (`nn.MultiheadAttention`, `nn.LSTM`) and
    configs with a dropout above zero.
    """

    __slots__ = ("_configs", "_modules", "_own")

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        every = list(modules)
        self._modules = [m for m in every if isinstance(m, nn.modules.dropout._DropoutNd)]
        self._own = [(m, k) for m in every for k, v in vars(m).items() if "drop" in k and isinstance(v, float)]
        self._configs = list({id(c): c for m in every if hasattr(c := m.__dict__.get("config"), "__dict__")}.values())

    def active(self) -> bool:
        """True when a dropout probability is above zero."""
        own = any(isinstance(p := vars(m).get(k), float) and p > 0 for m, k in self._own)
        return own or any(m.p > 0 for m in self._modules) or any(map(_drops, self._configs))


def _drops(config: Any) -> bool:
    return any(isinstance(v, float) and v > 0 for k, v in vars(config).items() if "drop" in k)


def install_generate(model: nn.Module, comm: Comm, undo: Undo) -> None:
    """Make `generate` of the model, and of models inside of it, agree on arguments and random numbers; journalled in `undo`."""
    for module in model.modules():
        if callable(getattr(type(module), "generate", None)):
            undo.set_attribute(module, "generate", SyncedGenerate(module, comm))
