"""Checks that the ranks get the same inputs.

Tensor-parallel ranks compute one model together, so they need one batch. A number that stands for the arguments is gathered from
all ranks before `generate`, and before forwards of the model: the first ones, then every 256th. It covers the values of tensors of
whole numbers and truth values, the shape and dtype of other tensors, and plain Python values. `AUTOTP_CHECK_INPUTS` says how often:
`first` (the default), `always` or `never`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from autotp.adapters import setting_of
from autotp.digest import digest, plain_text, tensor_digest
from autotp.errors import AutoTPError, InputError, LostRankError
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.transforms import refuse_transforms
from autotp.rewrite.undo import Undo

VARIABLE = "AUTOTP_CHECK_INPUTS"
ADAPTERS = "the setting of the adapters (set_adapter, disable_adapter, merge_adapter)"
_FIRST, _EVERY = 4, 256
_MODES = ("first", "always", "never")


def mode_of_environment() -> str:
    """Returns the mode that the environment variable sets.

    Raises:
        InputError: something else than `first`, `always` or `never`.
    """
    mode = os.environ.get(VARIABLE, "first")
    if mode not in _MODES:
        raise InputError(f"the environment variable {VARIABLE} is {mode!r}, wanted one of {', '.join(_MODES)}")
    return mode


def described(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """Returns argument → a text that is the same on two ranks where the argument may be taken for the same."""
    named = {f"argument {i}": a for i, a in enumerate(args)} | {f"argument {k!r}": v for k, v in kwargs.items()}
    return {name: _text(value) for name, value in named.items()}


def _text(value: Any, depth: int = 0) -> str:
    if isinstance(value, Tensor):
        whole = not (value.dtype.is_floating_point or value.dtype.is_complex) and value.layout is torch.strided and not value.is_meta
        return tensor_digest(value) if whole else f"{value.dtype}{tuple(value.shape)}"
    if isinstance(value, Mapping) and depth < 4:
        return f"{type(value).__name__}{[(str(k), _text(v, depth + 1)) for k, v in value.items()]}"
    if isinstance(value, tuple | list) and depth < 4:
        return f"{type(value).__name__}{[_text(v, depth + 1) for v in value]}"
    plain = value is None or isinstance(value, bool | int | float | str)
    return (plain_text(value) if plain else None) or type(value).__name__


def compare_inputs(
    comm: Comm, where: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], device: torch.device, model: nn.Module | None = None
) -> None:
    """Raise on every rank where the arguments of a call, or the settings of the adapters of `model`, differ between ranks. Collective.

    Raises:
        AutoTPError: names the first argument that differs, and the ranks. LostRankError: another rank did not make this call.
    """
    own = described(args, kwargs)
    if model is not None and (setting := setting_of(model)):
        own[ADAPTERS] = setting
    began = time.monotonic()
    try:
        numbers = [int(t) for t in comm.all_gather(torch.tensor([digest(repr(own))], dtype=torch.int64, device=device))]
    except LostRankError as error:
        waited = f"{where} was called on rank {comm.rank}, and {time.monotonic() - began:.0f} s later not on every rank"
        raise LostRankError(f"{waited}: {error}") from error
    if len(set(numbers)) == 1:
        return
    everyone = _texts(comm, own, device)
    names = list(dict.fromkeys(name for each in everyone for name in each))
    first = next((n for n in names if len({each.get(n) for each in everyone}) > 1), names[0] if names else "the arguments")
    if len({each.get(ADAPTERS) for each in everyone}) > 1:  # then other arguments may differ because of it
        first = ADAPTERS
    other = next((r for r, each in enumerate(everyone) if each.get(first) != everyone[0].get(first)), 1)
    advice = (
        "Put adapters on, switch and merge them on every rank"
        if first == ADAPTERS
        else "The ranks of one tensor-parallel group need the same batch: give data loaders the data-parallel rank, not the global one"
    )
    raise AutoTPError(
        f"{where} was called with different inputs on different ranks: {first} on rank {other} is not what it is on rank 0. {advice}. "
        f"{VARIABLE}=never turns this check off."
    )


def _texts(comm: Comm, own: dict[str, str], device: torch.device) -> list[dict[str, str]]:
    """Returns every rank's `own`."""
    import json

    data = torch.tensor(list(json.dumps(own).encode()), dtype=torch.uint8, device=device)
    sizes = [int(t) for t in comm.all_gather(torch.tensor([data.numel()], dtype=torch.int64, device=device))]
    padded = torch.cat([data, data.new_zeros(max(sizes) - data.numel())])
    return [json.loads(bytes(t[:n].tolist()).decode()) for t, n in zip(comm.all_gather(padded), sizes, strict=True)]


class SameInputs:
    """Forward pre-hook of the root: compares the arguments of the first calls and of every 256th after them."""

    def __init__(self, comm: Comm, always: bool, name: str) -> None:
        self._comm, self._always, self._name = comm, always, name

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if is_dynamo_compiling() or torch._C._len_torch_dispatch_stack():  # an exporter takes a comparison for a part of the model
            return
        running = self._comm.running
        calls = running.compared
        running.compared = calls + 1
        if calls < _FIRST or self._always or calls % _EVERY == 0:
            p = next(model.parameters(), None)
            if p is not None and not p.is_meta and self._comm.size > 1:
                refuse_transforms()
                compare_inputs(self._comm, self._name, args, kwargs, p.device, model)


def install_same_inputs(model: nn.Module, comm: Comm, undo: Undo) -> None:
    """Compare the arguments of `model` between ranks; journalled in `undo`.

    Raises:
        InputError: as `mode_of_environment`.
    """
    mode = mode_of_environment()
    if mode != "never":
        check = SameInputs(comm, mode == "always", type(model).__name__)
        undo.push(model.register_forward_pre_hook(check, prepend=True, with_kwargs=True).remove)
