"""Checks that a stored training state fits a model and its optimizer, and names every misfit before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from autotp.checkpoint.contents import Contents, Group, Param, is_scalar_state, listed, whole
from autotp.checkpoint.storage import read
from autotp.errors import CheckpointError
from autotp.rewrite.parameters.dcp import Sharded

#: What learning rate schedulers add to a group: a checkpoint may hold them before there is a scheduler, and the other way round.
_SCHEDULERS = frozenset({"initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum"})


@dataclass(frozen=True, slots=True)
class Stored:
    """Holds the index of a checkpoint, taken apart: the facts known of each tensor, None for another value."""

    folder: Path
    model: dict[str, TensorStorageMetadata | None]
    states: dict[str, dict[str, TensorStorageMetadata | None]]
    options: dict[int, dict[str, TensorStorageMetadata | None]]

    @staticmethod
    def of(folder: Path, index: Metadata) -> Stored:
        """Takes keys apart by the path that DCP notes beside each, as names contain dots."""
        stored = Stored(folder, {}, {}, {})
        for key, entry in index.state_dict_metadata.items():
            known = entry if isinstance(entry, TensorStorageMetadata) else None
            match (index.planner_data or {}).get(key, ()):
                case ("model", *path):
                    stored.model[".".join(map(str, path))] = known
                case ("optimizer", "state", name, state):
                    stored.states.setdefault(name, {})[state] = known
                case ("optimizer", "param_groups", int(group), option):
                    stored.options.setdefault(group, {})[option] = known
        return stored

    def name(self, name: str, aliases: Mapping[str, str]) -> str:
        """Returns the name under which a parameter or buffer is stored: its own, or that of one that is tied to it."""
        others = (other for other, first in aliases.items() if first == name and other in self.model)
        return name if name in self.model else next(others, name)

    def groups(self) -> list[Group]:
        """Returns the groups of the stored optimizer. Reads their hyperparameters, on this rank alone."""
        values: dict[str, Any] = {}
        for i, stored in self.options.items():
            values |= {f"optimizer.param_groups.{i}.{option}": _blank(known) for option, known in stored.items()}
        read(values, self.folder, None, alone=True)
        found = []
        for i in sorted(self.options):
            options: dict[str, Any] = {option: _value(values[f"optimizer.param_groups.{i}.{option}"]) for option in self.options[i]}
            found.append(Group(options.pop("params", []), options))
        return found


def _blank(known: TensorStorageMetadata | None) -> Any:
    return None if known is None else whole(torch.zeros(known.size, dtype=known.properties.dtype))


def _value(filled: Any) -> Any:
    return filled.local if isinstance(filled, Sharded) else filled


def fit_model(stored: Stored, contents: Contents) -> None:
    """Raise CheckpointError unless the stored parameters and buffers are those of the model."""
    problems = []
    for name, entry in contents.model().items():
        saved = stored.name(name, contents.aliases)
        if saved not in stored.model:
            problems.append(f"{name} is not in the checkpoint")
        elif (wrong := _differs(stored.model[saved], entry.layout.shape, entry.local.dtype)) is not None:
            problems.append(f"{name} {wrong}")
    known = {*contents.params, *contents.buffers, *contents.aliases}
    problems += [f"the checkpoint has {name}, the model has not" for name in stored.model if name not in known]
    if problems:
        raise CheckpointError(f"{stored.folder} was not saved from this model (build it as it was, in the same dtype):{listed(problems)}")


def fit_optimizer(stored: Stored, contents: Contents, groups: list[Group]) -> None:
    """Raise CheckpointError unless the stored optimizer is of the same kind, over the same groups."""
    mine = contents.groups or []
    if not groups:
        raise CheckpointError(f"{stored.folder} holds no state of an optimizer: load(model, None, path) loads the model alone")
    problems = []
    if len(groups) != len(mine):
        problems.append(f"the checkpoint has {len(groups)} parameter groups, the optimizer {len(mine)}")
    for i, (got, wanted) in enumerate(zip(groups, mine, strict=False)):
        problems += _group_differs(i, got, wanted, contents.aliases)
    in_groups = {name for group in mine for name in group.names}
    for name, states in stored.states.items():
        name = contents.aliases.get(name, name)
        if name in in_groups:
            problems += _state_differs(contents.params[name], states, contents.states.get(name, {}))
    if problems:
        raise CheckpointError(
            f"the optimizer is not the one that {stored.folder} was saved with (make it with the same class, options and groups):"
            f"{listed(problems)}"
        )


def _group_differs(i: int, got: Group, wanted: Group, aliases: Mapping[str, str]) -> list[str]:
    problems = []
    saved = {aliases.get(name, name) for name in got.names}
    if lacking := sorted(saved - set(wanted.names)):
        problems.append(f"group {i} was saved with {_few(lacking)}, which the optimizer does not have there")
    if surplus := sorted(set(wanted.names) - saved):
        problems.append(f"group {i} of the optimizer has {_few(surplus)}, which was not saved there")
    if lacking := sorted(set(got.options) - set(wanted.options) - _SCHEDULERS):
        problems.append(f"group {i} was saved with {_few(lacking)}, which are no options of the optimizer")
    if surplus := sorted(set(wanted.options) - set(got.options) - _SCHEDULERS):
        problems.append(f"group {i} of the optimizer has the options {_few(surplus)}, which were not saved")
    return problems


def _state_differs(param: Param, stored: Mapping[str, TensorStorageMetadata | None], mine: Mapping[str, Any]) -> list[str]:
    problems = []
    if mine and set(mine) != set(stored):
        problems.append(f"{param.name} was saved with the state {sorted(stored)}, the optimizer has {sorted(mine)}")
    for key, known in stored.items():
        value = mine.get(key)
        if known is None or (value is not None and not isinstance(value, torch.Tensor)):
            if value is not None and isinstance(value, torch.Tensor) != (known is not None):
                problems.append(f"state {key!r} of {param.name} was saved as a {'tensor' if known else 'value'}, which it is not here")
            continue
        is_moment = tuple(known.size) == param.layout.shape and not is_scalar_state(key, known.size)
        if value is None:
            if param.is_cut and not is_moment and known.size.numel() != 1:
                problems.append(
                    f"state {key!r} of {param.name} was saved in shape {tuple(known.size)}, which cannot be cut as the parameter is"
                )
            continue
        shape = param.layout.shape if value.shape == param.tensor.shape else tuple(value.shape)
        if (wrong := _differs(known, shape, value.dtype)) is not None:
            problems.append(f"state {key!r} of {param.name} {wrong}")
    return problems


def _differs(known: TensorStorageMetadata | None, shape: tuple[int, ...], dtype: torch.dtype) -> str | None:
    if known is None:
        return "was not saved as a tensor"
    if tuple(known.size) != tuple(shape):
        return f"was saved in shape {tuple(known.size)}, here it has {tuple(shape)}"
    if known.properties.dtype != dtype:
        return f"was saved as {known.properties.dtype}, here it is {dtype}"
    return None


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
