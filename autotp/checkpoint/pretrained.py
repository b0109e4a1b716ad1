"""Gives the state of a model as transformers writes it: which tensors, by which keys, in which files, with which config.

transformers' own code does this (tied weights, conversions backwards), run on `Deferred` tensors, as for the skeleton of a
checkpoint that has not been read.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autotp.checkpoint.deferred import Deferred, hollow, node_of
from autotp.checkpoint.files import INDEX
from autotp.checkpoint.nodes import Node
from autotp.checkpoint.progress import without_theirs
from autotp.errors import CheckpointError, InputError
from autotp.plan.spec import LocalAttribute
from autotp.rewrite.attributes import before


def is_pretrained(model: nn.Module) -> bool:
    """True for a model of transformers."""
    import sys

    transformers = sys.modules.get("transformers")  # a model of it exists only after it was imported
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def as_saved(model: Any, state: Mapping[str, Node], identity: Mapping[str, int]) -> dict[str, Node]:
    """Turns `state` (by the names of the model's `state_dict`) into the form that `save_pretrained` of transformers writes.

    Args:
        identity: a number for each name; names of tied tensors have the same.

    Raises:
        CheckpointError: transformers cannot revert a conversion.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = set(model._keys_to_ignore_on_save or ())
    stand_ins: dict[int, Tensor] = {}
    kept = {name: stand_ins.setdefault(identity[name], torch.empty(1)) for name in state if name not in ignored}
    try:
        names = remove_tied_weights_from_state_dict(kept, model)
        deferred = {name: Deferred(state[name]) for name in names}
        converted = revert_weight_conversion(_Whole(model, state), deferred)
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"transformers cannot write {type(model).__name__} in its checkpoint's form: {error}") from error
    return {key: node_of(tensor) for key, tensor in converted.items()}


class _Whole:
    """Stands for a parallel model where code asks for the shapes of its parameters: they are those of the whole model."""

    def __init__(self, model: nn.Module, state: Mapping[str, Node]) -> None:
        self._model, self._state = model, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        return hollow(self._state[name])

    get_parameter_or_buffer = get_parameter


def without_copies(state: Mapping[str, Node], identity: Mapping[str, int]) -> tuple[dict[str, Node], dict[str, str]]:
    """Keeps the first in order of names of those that are one tensor, as the safetensors library does; also returns left out → kept."""
    first: dict[int, str] = {}
    for name in sorted(state):
        first.setdefault(identity[name], name)
    kept = {name: node for name, node in state.items() if first[identity[name]] == name}
    return kept, {name: first[identity[name]] for name in state if name not in kept}


def split(tensors: Mapping[str, Node], max_shard_size: int | str) -> dict[str, dict[str, Node]]:
    """Returns file name → its tensors, as huggingface_hub splits them.

    Raises:
        InputError: `max_shard_size` is no size.
    """
    from huggingface_hub import split_state_dict_into_shards_factory

    try:
        found = split_state_dict_into_shards_factory(
            dict(tensors),
            get_storage_size=lambda node: prod(node.shape) * node.dtype.itemsize,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"max_shard_size={max_shard_size!r}: wanted bytes, or text such as '5GB'") from error
    return {file: {key: tensors[key] for key in keys} for file, keys in found.filename_to_tensors.items()}


def write_index(directory: Path, files: Mapping[str, Mapping[str, Node]], parameters: int) -> None:
    """Writes the index of several files; nothing for one."""
    if len(files) == 1:
        return
    size = sum(prod(n.shape) * n.dtype.itemsize for tensors in files.values() for n in tensors.values())
    content = {
        "metadata": {"total_parameters": parameters, "total_size": size},
        "weight_map": {key: file for file, tensors in files.items() for key in tensors},
    }
    (directory / INDEX).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_config(directory: Path, model: Any, attributes: Sequence[LocalAttribute]) -> None:
    """Writes config.json, generation_config.json and the other files that the model's class saves beside weights.

    The class's own `save_pretrained` writes them, of a state without tensors. `attributes`: those of the model itself that are
    local; a checkpoint has the values of the whole model.
    """
    config = copy.copy(before(model, "config", attributes, type(model).__name__))
    config.architectures = [type(model).__name__]
    had, own = "config" in model.__dict__, model.config
    model.config = config
    try:
        with without_theirs():
            model.save_pretrained(directory, state_dict={})
    except Exception as error:
        raise CheckpointError(f"{type(model).__name__} cannot write its config: {error}") from error
    finally:
        if had:
            model.config = own
        else:
            del model.config
    for path in directory.glob("*.safetensors"):  # a file without tensors
        path.unlink()
