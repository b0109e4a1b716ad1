"""Lists the contents of a training state: tensors of the model and of the optimizer by name, each with its layout.

The names are those that torch.distributed.checkpoint gives to `{"model": model.state_dict(), "optimizer": …}` of one device, the
optimizer's as in `torch.distributed.checkpoint.state_dict.get_optimizer_state_dict`:

| key                                   | value                                                                          |
|---------------------------------------|--------------------------------------------------------------------------------|
| `model.NAME`                          | a parameter or persistent buffer, in the model's order and shape               |
| `optimizer.state.NAME.STATE`          | a moment of it, in the same order and shape; or a number such as `step`        |
| `optimizer.param_groups.I.params`     | the names of the parameters of group I                                         |
| `optimizer.param_groups.I.OPTION`     | a hyperparameter of it                                                         |

This module reads a model and an optimizer; it changes neither, but has FSDP let go of what it gathered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp.errors import CheckpointError
from autotp.plan.boxes import piece_dim
from autotp.plan.layout import Layout, replicated
from autotp.plan.spec import ParamPlan
from autotp.rewrite.parameters.chunk import Chunk, held_of
from autotp.rewrite.parameters.data_parallel import chunk_of
from autotp.rewrite.parameters.dcp import Sharded
from autotp.rewrite.parameters.fsdp import reshard
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, layout_of
from autotp.rewrite.parameters.names import Names

#: Tensors are written in boxes of at most so many bytes: who reads a part holds no more than that of the rest.
BOX = 64 << 20
_PLAIN = (bool, int, float, str, torch.dtype, type(None))


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of the model, by its first name, with its layout."""

    name: str
    tensor: Tensor
    layout: Layout
    rank: int
    local: Tensor  # this rank's part, of shape `layout.local_shape`, or the chunk of it that FSDP gave the rank
    chunk: Chunk | None = None

    @property
    def is_cut(self) -> bool:
        """True when no rank holds all of it."""
        return self.layout.dim is not None or self.chunk is not None

    def clear_padding_(self, local: Tensor) -> None:
        """Writes zeros to the padding of `local`, the rank's part of this parameter or of a moment of it."""
        for a, b in held_of(self.chunk, self.layout.dim, self.layout.padding(self.rank)):
            local.narrow(piece_dim(self.layout), a, b - a).zero_()


@dataclass(frozen=True, slots=True)
class Group:
    """A group of an optimizer: the names of its parameters in order, and its hyperparameters."""

    names: list[str]
    options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Contents:
    """Holds everything that is saved. `aliases`: other name of a tied parameter or buffer → the first one."""

    params: dict[str, Param]
    buffers: dict[str, Tensor]
    aliases: dict[str, str]
    groups: list[Group] | None = None
    states: dict[str, dict[str, Any]] = field(default_factory=dict)

    def model(self, box: int | None = None) -> dict[str, Sharded]:
        """Returns parameters and buffers by name, as DCP takes them."""
        found = {name: Sharded(p.local, p.layout, p.rank, box, p.chunk) for name, p in self.params.items()}
        return found | {name: whole(buffer, box) for name, buffer in self.buffers.items()}


def local_of(tensor: Tensor) -> Tensor:
    """Returns this rank's part of a parameter or of a moment."""
    if isinstance(tensor, LayoutDTensor):
        return tensor._held().detach()
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()


def whole(tensor: Tensor, box: int | None = None) -> Sharded:
    """Wraps a tensor that every rank holds."""
    return Sharded(local_of(tensor), replicated(tuple(tensor.shape), 1), 0, box)


def moment(param: Param, value: Tensor, box: int | None = None) -> Sharded:
    """Wraps a tensor of the optimizer's state of `param`: in the parameter's layout where it has its shape."""
    if value.shape != param.tensor.shape:
        return whole(value, box)
    if isinstance(value, LayoutDTensor):
        return Sharded(local_of(value), value._layout, param.rank, box, chunk_of(value, value._layout))
    return Sharded(local_of(value), param.layout, param.rank, box, param.chunk)


def contents_of(model: nn.Module, plans: Mapping[str, ParamPlan], rank: int, optimizer: Any) -> Contents:
    """Collects the contents to save of `model`, laid out by `plans`, and of `optimizer` (None: nothing).

    Raises:
        CheckpointError: names everything that cannot be saved.
    """
    problems: list[str] = []
    reshard(model)
    params, aliases = _params(model, plans, rank, problems)
    buffers = _buffers(model, Names(plans), aliases, problems)
    found = Contents(params, buffers, aliases)
    if optimizer is not None and not problems:
        groups = list(_groups(optimizer, params, problems))
        found = Contents(params, buffers, aliases, groups, dict(_states(optimizer, params, groups, problems)))
    if problems:
        raise CheckpointError(f"{type(model).__name__} cannot be saved or loaded as it is:{listed(problems)}")
    return found


def listed(problems: list[str], most: int = 6) -> str:
    """Writes the lines of a message that names all mistakes, or the first few."""
    more = [f"… and {len(problems) - most} more"] if len(problems) > most else []
    return "".join(f"\n  {line}" for line in [*problems[:most], *more])


def _params(model: nn.Module, plans: Mapping[str, ParamPlan], rank: int, problems: list[str]) -> tuple[dict[str, Param], dict[str, str]]:
    own_name = Names(plans)
    params: dict[str, Param] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for called, p in model.named_parameters(remove_duplicate=False):
        name = own_name(called)
        if first.setdefault(id(p), name) != name:
            aliases[name] = first[id(p)]
            continue
        known = plans.get(name)
        layout = layout_of(p, None if known is None else known.layout)
        param = Param(name, p, layout, rank, local_of(p), chunk_of(p, layout))
        wanted = layout.local_shape if param.chunk is None else param.chunk.shape(layout.local_shape)
        if p.is_meta:
            problems.append(f"{name} is on the meta device and has no values: load weights into the model first")
        elif tuple(param.local.shape) != wanted or (not isinstance(p, DTensor) and tuple(p.shape) != layout.shape):
            problems.append(
                f"{name}: this rank holds a part of shape {tuple(param.local.shape)}, autotp's plan says {wanted}: another "
                "parallelism has sharded it further, or a tensor of another shape was put there; put a whole one there, of shape "
                f"{layout.shape}"
            )
        params[name] = param
    return params, aliases


def _buffers(model: nn.Module, own_name: Names, aliases: dict[str, str], problems: list[str]) -> dict[str, Tensor]:
    buffers: dict[str, Tensor] = {}
    first: dict[int, str] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            problems.append(
                f"{path or type(module).__name__} has extra state (get_extra_state), of which nothing is known: save it yourself"
            )
        for leaf, buffer in module._buffers.items():
            name = own_name(f"{path}.{leaf}" if path else leaf)
            if buffer is None or leaf in module._non_persistent_buffers_set:
                continue
            if first.setdefault(id(buffer), name) != name:
                aliases[name] = first[id(buffer)]
                continue
            if buffer.is_meta:
                problems.append(f"the buffer {name} is on the meta device and has no values")
            buffers[name] = buffer
    return buffers


def _groups(optimizer: Any, params: Mapping[str, Param], problems: list[str]) -> Iterator[Group]:
    names = {id(p.tensor): name for name, p in params.items()}
    for i, group in enumerate(optimizer.param_groups):
        strange = [tuple(p.shape) for p in group["params"] if id(p) not in names]
        if strange:
            problems.append(
                f"group {i} of the optimizer has {len(strange)} parameters that are not the model's (the first of shape {strange[0]}): "
                "make the optimizer after parallelize, from model.parameters()"
            )
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        for key, value in options.items():
            if not _is_plain(value) and not isinstance(value, Tensor):
                problems.append(f"{key!r} of group {i} of the optimizer is a {type(value).__name__}; numbers, texts and tensors are saved")
        yield Group([names[id(p)] for p in group["params"] if id(p) in names], options)


def _states(optimizer: Any, params: Mapping[str, Param], groups: list[Group], problems: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in (name for group in groups for name in group.names):
        param = params[name]
        state = dict(optimizer.state.get(param.tensor, {}))
        for key, value in state.items():
            if isinstance(value, Tensor):
                if (problem := unfit(param, key, value)) is not None:
                    problems.append(problem)
            elif not _is_plain(value):
                problems.append(f"state {key!r} of {name} is a {type(value).__name__}; tensors, numbers and texts are saved")
        if state:
            yield name, state


def unfit(param: Param, key: str, value: Tensor) -> str | None:
    """Says why the tensor `value` of the optimizer's state of `param` has no place in a checkpoint; None where it has."""
    if isinstance(value, DTensor) and any(p.is_partial() for p in value._spec.placements):
        return f"state {key!r} of {param.name} is a sum over ranks that was not taken yet"
    held = local_of(value)
    if value.is_meta:
        return f"state {key!r} of {param.name} is on the meta device and has no values"
    if not param.is_cut or value.numel() == 1:
        return None
    if isinstance(value, DTensor) and value.shape == param.tensor.shape and held.shape == param.local.shape:
        return None
    return (
        f"state {key!r} of {param.name} has shape {tuple(value.shape)}, the parameter {param.layout.shape}, cut over {param.layout.tp} "
        "ranks: only state of the parameter's shape is known to follow its layout (AdamW, SGD, …); row and column factors are not"
    )


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def is_scalar_state(key: str, shape: torch.Size) -> bool:
    """True for state that is no moment even where the parameter is a single number."""
    return len(shape) == 0 and key == "step"
