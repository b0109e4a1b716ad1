"""What autotp knows of the adapters of PEFT; PEFT itself is never imported here.

An *adapter layer* wraps a module of the model and adds a small trained term to its result. PEFT's protocol for these layers is the
same for all kinds of them (LoRA, DoRA, IA³, …): they are `BaseTunerLayer`s, and each names the tables that hold its own parameters.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor

from autotp.trace.example import Setting

#: So many further settings are traced: each costs a forward and a backward of the trace.
MOST_SETTINGS = 8
_ACTIVE, _OFF, _MERGED = "_active_adapter", "_disable_adapters", "merged_adapters"


def base_of(model: nn.Module) -> nn.Module:
    """The model that a wrapper of PEFT (`get_peft_model`) hands its calls on to; any other model itself."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return model
    inner: Any = model.base_model
    return inner.model if isinstance(inner, peft.tuners.tuners_utils.BaseTuner) else inner  # type: ignore[no-any-return]


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The adapter layers of a model by their paths; those around whole modules (`modules_to_save`) too."""
    peft = sys.modules.get("peft")
    if peft is not None:
        kinds = (peft.tuners.tuners_utils.BaseTunerLayer, peft.utils.AuxiliaryTrainingWrapper)
        yield from ((path, m) for path, m in model.named_modules() if isinstance(m, kinds))


def settings(model: nn.Module) -> tuple[Setting, ...]:
    """The settings that a user may switch the adapters of a model to: the present ones, or each one alone; on, off or merged.

    They are the attributes that `set_adapter`, `disable_adapter` and `merge_adapter` of PEFT set. A model with many adapters has the
    first `MOST_SETTINGS` of them.
    """
    found = list(layers(model))
    held = {path: _names(layer) for path, layer in found}
    present = {path: _listed(getattr(layer, _ACTIVE, None)) for path, layer in found}
    chosen = {"": present}
    for name in dict.fromkeys(name for each in held.values() for name in each):
        if any(present[path] != [name] for path, _ in found if name in held[path]):
            tuned = {path: hasattr(type(layer), _MERGED) for path, layer in found}  # these are switched even to an adapter not in them
            chosen[f" {name!r}"] = {path: [name] if tuned[path] or name in held[path] else [] for path, _ in found}
    modules = dict(found)
    states: list[Setting] = []
    for told, active in chosen.items():
        on: dict[tuple[str, str], object] = {(path, _ACTIVE): names for path, names in active.items()}
        into = {(p, _MERGED): [n for n in names if n in held[p]] for p, names in active.items() if hasattr(type(modules[p]), _MERGED)}
        on |= {key: [] for key in into}  # a forward that finds itself merged and off takes the sum back
        off = on | {(path, _OFF): True for path in active}
        on |= {(path, _OFF): False for path in active}
        states += [Setting(f"adapters{told}", on), Setting(f"adapters{told} off", off), Setting(f"adapters{told} merged", on | into)]
    now = {key: getattr(modules[key[0]], key[1], None) for state in states for key in state.values}
    return tuple([s for s in states if any(now[key] != value for key, value in s.values.items())][:MOST_SETTINGS])


def copy_onto(model: nn.Module, other: nn.Module) -> None:
    """Put adapters like those of `model` on `other`, a model of the same classes, with random numbers, and in the same setting."""
    if not any(True for _ in layers(model)):
        return
    peft = sys.modules["peft"]
    configs: dict[str, Any] = model.peft_config  # type: ignore[assignment]  # PEFT puts them on the model that it changes
    for name, config in configs.items():
        peft.inject_adapter_in_model(config, other, name)
    own = dict(layers(model))
    for path, layer in layers(other):
        like = own.get(path) or next(iter(own.values()))
        for attribute in (_ACTIVE, _OFF, _MERGED):
            if attribute in like.__dict__:
                layer.__dict__[attribute] = copy.copy(like.__dict__[attribute])
        for p in (p for n, p in layer.named_parameters() if ".base_layer." not in f".{n}"):
            p.data.normal_(std=0.02)  # zero, as some start, would hide what is wrong with the other factor


def setting_of(model: nn.Module) -> str:
    """The setting that the adapters of a model have, as a text; "" where there are none."""
    found = [(path, *(getattr(layer, name, None) for name in (_ACTIVE, _OFF, _MERGED))) for path, layer in layers(model)]
    return repr(found) if found else ""


def _listed(active: object) -> list[str]:
    return [active] if isinstance(active, str) else list(active) if isinstance(active, list | tuple) else []


def _names(layer: Any) -> list[str]:
    """The adapters that a layer has parameters for."""
    tables = [getattr(layer, name, None) for name in layer.adapter_layer_names]
    return list(dict.fromkeys(name for table in tables if isinstance(table, nn.ModuleDict | nn.ParameterDict) for name in table))


def stop_averaging(parameter: nn.Parameter) -> None:
    """Take off the hook with which transformers' Trainer averages the gradient of a plain parameter over all ranks.

    It puts the hook on adapters beside a base that is made of DTensors, as it takes them for parameters of which each rank has a copy
    and a batch of its own. A parameter that is cut, or whole on ranks with one batch, has its gradient already.
    """
    hooks = parameter._post_accumulate_grad_hooks
    for key, hook in list((hooks or {}).items()):
        if getattr(hook, "__qualname__", "").startswith("Trainer._sync_replicated_trainable_parameters"):
            del hooks[key]


def parameters(model: nn.Module) -> frozenset[tuple[str, bool]]:
    """The names of the parameters of adapter layers, and whether each is a DTensor, as those of a parallel model are."""
    return frozenset((f"{path}.{n}", isinstance(p, DTensor)) for path, layer in layers(model) for n, p in layer.named_parameters())
