"""Random numbers that must agree: sampling draws the same token on every rank, replicated dropout the same mask.

Rank 0's generator states are broadcast before `generate`, and before a training forward of a model with active dropout. Models inside of
the model do the same where they are called by themselves, and so does a dropout that is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from autotp.rewrite.comm import Comm
from autotp.rewrite.same_inputs import compare_inputs, mode_of_environment
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
    """Where the model's parameters are (the CPU for a model without any)."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class SyncedGenerate:
    """`model.generate` that starts from rank 0's generator state, with the same arguments on all ranks.

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
            compare_inputs(self._comm, f"{type(self._model).__name__}.generate", args, kwargs, device)
        sync_rng(self._comm, device)
        return self._generate(*args, **kwargs)


class SyncedDropout:
    """Root forward pre-hook: agree on the generator state if any dropout will draw from it."""

    def __init__(self, model: nn.Module, comm: Comm) -> None:
        self._comm = comm
        self._dropouts = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
        self._config = getattr(model, "config", None)

    @property
    def possible(self) -> bool:
        """True where there is something that may drop, whatever its probability is now."""
        return bool(self._dropouts) or any("drop" in k for k in getattr(self._config, "__dict__", {}))

    def active(self) -> bool:
        """True when a dropout probability is above zero."""
        if any(m.p > 0 for m in self._dropouts):
            return True
        values = getattr(self._config, "__dict__", {})
        return any(isinstance(v, float) and v > 0 for k, v in values.items() if "drop" in k)

    def __call__(self, model: nn.Module, args: Any) -> None:
        if model.training and self.active():
            sync_rng(self._comm, device_of(model))


def _entries(model: nn.Module) -> list[nn.Module]:
    """The modules that people call: the model, its children, and models inside of it (they generate, or load weights by themselves)."""
    inner = [m for m in model.modules() if hasattr(type(m), "generate") or hasattr(type(m), "from_pretrained")]
    return list(dict.fromkeys((model, *model.children(), *inner)))


def install_rng(model: nn.Module, comm: Comm, undo: Undo) -> None:
    """Make `generate` and training forwards agree on random numbers, of the models inside of `model` too; journalled in `undo`."""
    for entry in _entries(model):
        if callable(getattr(type(entry), "generate", None)):
            undo.set_attribute(entry, "generate", SyncedGenerate(entry, comm))
        drops = SyncedDropout(entry, comm)
        if entry is model or drops.possible:
            undo.push(entry.register_forward_pre_hook(drops, prepend=True).remove)
