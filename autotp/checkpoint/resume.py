"""Fills a model and its optimizer from a checkpoint that was found to fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor, Replicate

from autotp.checkpoint.contents import Contents, Group, Param, is_scalar_state, moment
from autotp.checkpoint.fit_state import Stored
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor


class Resume:
    """Says where each stored value goes. DCP fills `values`: tensors that exist in place, the others' in fresh ones.

    Nothing of the model or the optimizer changes before `values` is filled; `finish` then puts the remaining ones in place.
    """

    def __init__(self, stored: Stored, contents: Contents, optimizer: Any, groups: list[Group]) -> None:
        self._contents, self._optimizer, self._groups = contents, optimizer, groups
        self.values: dict[str, Any] = {f"model.{stored.name(n, contents.aliases)}": s for n, s in contents.model().items()}
        #: parameter → state → the value, or the key in `values` where it will be
        self._states: dict[str, dict[str, Any]] = {}
        for param, options in self._grouped():
            name = stored.name(param.name, contents.aliases)
            there, mine = stored.states.get(name, {}), contents.states.get(param.name, {})
            self._states[param.name] = {
                key: self._target(param, options, key, there[key], mine.get(key), f"optimizer.state.{name}.{key}")
                for key in dict.fromkeys([*mine, *sorted(there)])  # in the order that they were made in
                if key in there
            }

    def _grouped(self) -> Iterator[tuple[Param, dict[str, Any]]]:
        for group in self._contents.groups or []:
            for name in group.names:
                yield self._contents.params[name], group.options

    def _target(
        self, param: Param, options: dict[str, Any], key: str, known: TensorStorageMetadata | None, mine: Any, stored_as: str
    ) -> Any:
        if known is None:
            self.values[stored_as] = None
            return _Later(stored_as)
        value = mine if mine is not None else _fresh(param, options, key, known)
        self.values[stored_as] = moment(param, value)
        return value

    def finish(self) -> None:
        """Sets padding to zero, and state and hyperparameters to those of the checkpoint."""
        for param in self._contents.params.values():
            param.clear_padding_(param.local)
            if isinstance(param.tensor, LayoutDTensor):
                with torch.no_grad():
                    param.tensor._take_back_(param.local)
        for param, _ in self._grouped():
            state = self._states[param.name]
            for value in state.values():
                if isinstance(value, Tensor) and value.shape == param.tensor.shape:
                    param.clear_padding_(moment(param, value).local)
            if state:
                self._optimizer.state[param.tensor] = {
                    key: self.values[value.key] if isinstance(value, _Later) else value for key, value in state.items()
                }
            else:
                self._optimizer.state.pop(param.tensor, None)
        for group, saved in zip(self._optimizer.param_groups if self._optimizer is not None else [], self._groups, strict=True):
            for key, value in saved.options.items():
                if isinstance(group.get(key), Tensor) and isinstance(value, Tensor):
                    group[key].copy_(value)
                else:
                    group[key] = value


class _Later:
    """A value that is no tensor, known when `key` has been read."""

    __slots__ = ("key",)

    def __init__(self, key: str) -> None:
        self.key = key


@torch.no_grad()
def _fresh(param: Param, options: dict[str, Any], key: str, known: TensorStorageMetadata) -> Tensor:
    """Makes state as the optimizer would: a moment like its parameter, a number where the optimizer keeps it."""
    dtype, p = known.properties.dtype, param.tensor
    if tuple(known.size) == param.layout.shape and not is_scalar_state(key, known.size):
        return torch.zeros_like(p.detach(), dtype=dtype)
    on_cpu = key == "step" and not (options.get("capturable") or options.get("fused"))  # torch's own rule, in Optimizer.load_state_dict
    made = torch.zeros(known.size, dtype=dtype, device="cpu" if on_cpu else param.local.device)
    if known.size and isinstance(p, DTensor):
        return DTensor.from_local(made, p.device_mesh, (Replicate(),) * p.device_mesh.ndim, run_check=False)
    return made
