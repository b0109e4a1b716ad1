"""Answers, on the model itself, what transformers and accelerate ask of models that transformers made parallel.

`Trainer`, trl's trainers, continuous batching and accelerate's `prepare` read these, and deal data by them:

| asked | answer |
|---|---|
| `model._tp_size` (`model.tp_size`) | the ranks of the mesh's tp dim |
| `model._device_mesh` | the 1-D mesh of these ranks, its dim named "tp" |
| `model.config.distributed_config` | a `DistributedConfig` with the tp size, and the sizes of the dims that FSDP shards the model over |
| `model.tp_plan` | no plan of transformers (`autotp.integrations.peft`) |
| `model._is_distributed_loading_by_transformers` | True: do not wrap the model, and let every rank take part in saving |
| `model.save_pretrained(directory)` | `autotp.save_pretrained`, a collective |
| `model.init_continuous_batching(…)` | a manager whose cache has a rank's heads (`autotp.integrations.continuous`), a collective |

They are attributes of the instance, so nothing of transformers changes. What is written, pickled, or copied from the config alone has
none of them: a config that says "parallel" beside a whole model would make `save_pretrained` wait for ranks that do not come.
"""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autotp.checkpoint.saving import save_pretrained
from autotp.errors import AutoTPError, PlanError
from autotp.hugging_face import is_hugging_face
from autotp.integrations.continuous import install_continuous
from autotp.preflight import tp_mesh
from autotp.rewrite.guards.saving import SaveWhole
from autotp.rewrite.undo import Undo

_CONFIG = "distributed_config"


def install_answers(model: nn.Module, mesh: DeviceMesh, undo: Undo) -> None:
    """Have a model of transformers answer that it is parallel over the tp dim of `mesh`; journalled in `undo`."""
    if not is_hugging_face(model):
        return
    line = tp_mesh(mesh)
    _own_config(model, undo)
    undo.set_attribute(model, "_tp_size", line.size())
    undo.set_attribute(model, "_device_mesh", _named(line))
    undo.set_attribute(model, "_is_distributed_loading_by_transformers", True)
    undo.set_item(vars(model.config), _CONFIG, _config_class()(model, line.size()))
    others = [at for at, name in zip(mesh.get_coordinate() or (), mesh.mesh_dim_names or (), strict=False) if name != "tp"]
    undo.set_attribute(model, "save_pretrained", SaveTogether(model, mesh.ndim == 1 or not any(others)))
    install_continuous(model, undo)


def _own_config(model: nn.Module, undo: Undo) -> None:
    """Give the model a config of its own: the answer in it would be wrong for another, whole model that was made of the same object."""
    shared = model.config
    own = copy.copy(shared)
    for module in model.modules():
        for name in [name for name, value in vars(module).items() if value is shared]:
            undo.set_attribute(module, name, own)


def _named(line: DeviceMesh) -> DeviceMesh:
    """Returns `line` with its dim named as transformers looks it up."""
    if line.mesh_dim_names == ("tp",):
        return line
    return DeviceMesh.from_group(line.get_group(), line.device_type, mesh_dim_names=("tp",))


def data_parallel_sizes(model: nn.Module) -> tuple[int, int]:
    """Returns how many ranks hold copies of a shard, and how many shards there are, under FSDP; (1, 1) without it."""
    for p in model.parameters():
        if isinstance(p, DTensor) and p.device_mesh.ndim > 1:
            mesh = p.device_mesh
            sizes = [mesh.size(i) for i, name in enumerate(mesh.mesh_dim_names or ()) if name != "tp"]
            return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[-1])
    return 1, 1


@functools.cache
def _config_class() -> type[Any]:
    """Makes the class of answers; only here is transformers imported, by whoever made the model."""
    from transformers.distributed import DistributedConfig

    class ParallelConfig(DistributedConfig):  # type: ignore[misc]
        """The sizes of a parallel model, read when they are asked for: FSDP may come after `parallelize`."""

        _of: Callable[[], nn.Module | None] = staticmethod(lambda: None)

        def __init__(self, model: nn.Module, tp_size: int) -> None:
            super().__init__(tp_size=tp_size, tp_plan={})
            self._of = weakref.ref(model)

        @property
        def fsdp_size(self) -> int:
            return self._sizes()[1]

        @fsdp_size.setter
        def fsdp_size(self, size: int) -> None:
            """What a dataclass sets at its start does not count."""

        @property
        def dp_replicate_size(self) -> int:
            return self._sizes()[0]

        @dp_replicate_size.setter
        def dp_replicate_size(self, size: int) -> None:
            """As above."""

        @property
        def dp_size(self) -> int:
            copies, shards = self._sizes()
            ranks = dist.get_world_size() if dist.is_initialized() else 1
            if self._of() is not None and copies * shards == 1 and ranks > self.tp_size:
                raise PlanError(
                    f"{ranks} ranks train a model that is parallel over {self.tp_size} of them: they would get other batches, and "
                    "nobody would average their gradients. Call autotp.fully_shard(model, mesh) first, or start a process for each tp rank"
                )
            return copies * shards

        def _sizes(self) -> tuple[int, int]:
            model = self._of()
            return (1, 1) if model is None else data_parallel_sizes(model)

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            copied = memo.get(id(self._of()))  # there in a copy of the whole model, which is parallel too; a config alone is not
            return type(self)(copied, self.tp_size) if isinstance(copied, nn.Module) else None

        def __reduce_ex__(self, protocol: Any) -> Any:
            return type(None), ()

    return ParallelConfig


class SaveTogether:
    """Replaces `model.save_pretrained`: without `state_dict` all ranks write the model together. It survives deepcopy."""

    def __init__(self, model: nn.Module, first: bool) -> None:
        self._model, self._first = model, first
        self._save = SaveWhole(model)
        functools.update_wrapper(self, self._save, updated=())

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with hidden(self._model):  # or transformers would gather, and wait for the other ranks, by itself
            bound = inspect.signature(self._save).bind(*args, **kwargs)
            if bound.arguments.get("state_dict") is not None:
                return self._save(*args, **kwargs)
            wanted = _flat(bound)
            directory = wanted.pop("save_directory")
            size = wanted.pop("max_shard_size", inspect.signature(self._save).parameters["max_shard_size"].default)
            _refuse_others(type(self._model).__qualname__, wanted, inspect.signature(self._save).parameters)
            if self._first or data_parallel_sizes(self._model) != (1, 1):
                save_pretrained(self._model, directory, max_shard_size=size)
            return None


def _flat(bound: inspect.BoundArguments) -> dict[str, Any]:
    """Returns the arguments by name, those of ** too."""
    found = dict(bound.arguments)
    rest = next((n for n, p in bound.signature.parameters.items() if p.kind is inspect.Parameter.VAR_KEYWORD), None)
    return found | found.pop(rest, {}) if rest is not None else found


def _refuse_others(name: str, wanted: Mapping[str, Any], parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raise for arguments that ask for something else than whole weights in one directory."""
    harmless = {"is_main_process", "state_dict", "safe_serialization", "save_function"}
    other = [n for n, value in wanted.items() if n not in harmless and not (n in parameters and parameters[n].default == value) and value]
    if other:
        raise AutoTPError(
            f"{name}.save_pretrained({', '.join(f'{n}=…' for n in other)}) is not possible for a parallel model: leave "
            f"{'it' if len(other) == 1 else 'them'} out, or give it state_dict=autotp.full_state_dict(model), which every rank has to make"
        )


@contextmanager
def hidden(model: nn.Module) -> Iterator[None]:
    """Takes the answer out of the model's config for a while."""
    config = vars(model.config)
    missing = object()
    answer = config.pop(_CONFIG, missing)
    try:
        yield
    finally:
        if answer is not missing:
            config[_CONFIG] = answer
