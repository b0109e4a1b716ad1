"""Finds blocks that are alike, so that a trace costs the same at any depth.

Two children of a `ModuleList` or `Sequential` are alike when their trees have the same classes, parameter and buffer shapes, hooks
and plain attributes. Functions among those are equal when their code and closed-over values are. A tensor or module that is also
held outside of its block (a tied parameter, a shared module) has to be the very same for both. An attribute that counts the blocks
is left out of the comparison. It equals the child's position in every child that has it, as `layer_idx` does in hybrids of two
kinds of blocks.

This module compares how blocks are built. `trace/blocks.py` compares how they are used, while the model runs.
"""

from __future__ import annotations

import functools
from collections import OrderedDict, defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence
from enum import Enum
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

_SKIP = frozenset(nn.Module().__dict__) - {"training"}
_HOOKS = tuple(k for k in nn.Module().__dict__ if k.endswith("_hooks"))
_FLAGS = tuple(k for k in nn.Module().__dict__ if "_hooks_" in k)
_PLAIN = (int, float, bool, str, type(None), complex, bytes, range, torch.dtype, torch.device, torch.layout, torch.memory_format, Enum)
_DICTS = (dict, OrderedDict, defaultdict)
_DEEP, _LONG = 6, 256
Key = tuple[str, str]


class Holders:
    """Knows who holds each tensor and each module of a model."""

    def __init__(self, model: nn.Module) -> None:
        self.count: dict[int, int] = {}
        for module in model.modules():
            for item in _held(module):
                self.count[id(item)] = self.count.get(id(item), 0) + 1

    def outside(self, block: nn.Module) -> set[int]:
        """Returns the ids of tensors and modules of `block` (but for itself) that something outside of it holds too."""
        inside: dict[int, int] = {}
        for module in block.modules():
            for item in _held(module):
                inside[id(item)] = inside.get(id(item), 0) + 1
        return {key for key, count in inside.items() if self.count[key] > count}

    def own(self, block: nn.Module) -> Iterator[nn.Module]:
        """Yields `block` and the modules inside of it that can be reached through it alone."""
        outside = self.outside(block)
        queue, seen = [block], {id(block)}
        while queue:
            module = queue.pop()
            yield module
            fresh = [m for m in module._modules.values() if m is not None and id(m) not in outside and id(m) not in seen]
            seen.update(map(id, fresh))
            queue += fresh


def _held(module: nn.Module) -> list[Tensor | nn.Module]:
    tables: tuple[Mapping[str, Any], ...] = (module._parameters, module._buffers, module._modules)
    return [item for table in tables for item in table.values() if item is not None]


class _Describer:
    """Describes a block in values that are equal for blocks that are alike."""

    def __init__(self, block: nn.Module, outside: set[int]) -> None:
        self.block, self.outside = block, outside
        self.inside: dict[int, str] = {id(m): path for path, m in block.named_modules()}
        self.tensors: dict[int, str] = {}
        for path, module in block.named_modules():
            for table in (module._parameters, module._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        self.tensors.setdefault(id(tensor), f"{path}.{name}")

    def describe(self) -> tuple[Hashable, dict[Key, Hashable]]:
        """Returns the tree, and its plain attributes by (path, name)."""
        parts: list[Hashable] = []
        attributes: dict[Key, Hashable] = {}
        for path, module in self.block.named_modules(remove_duplicate=False):
            tensors = tuple(
                (name, None if tensor is None else self._tensor(tensor))
                for table in (module._parameters, module._buffers)
                for name, tensor in table.items()
            )
            same = id(module) if id(module) in self.outside else self.inside[id(module)]
            parts.append((path, type(module), same, tensors, self._hooks(module)))
            if same == path or isinstance(same, int):
                attributes.update({(path, k): self.plain(v) for k, v in module.__dict__.items() if k not in _SKIP})
        return tuple(parts), attributes

    def _tensor(self, tensor: Tensor) -> Hashable:
        same = id(tensor) if id(tensor) in self.outside else self.tensors[id(tensor)]
        hooks = self.plain(list((tensor._backward_hooks or {}).values())), self.plain(list(_after(tensor).values()))
        return same, type(tensor), tuple(tensor.shape), tensor.dtype, tensor.layout, tensor.requires_grad, hooks

    def _hooks(self, module: nn.Module) -> Hashable:
        attributes = module.__dict__
        flags = [attributes[name] for name in _FLAGS]
        return tuple(
            (name, self.plain(hook), tuple(key in flag for flag in flags if isinstance(flag, dict)))
            for name in _HOOKS
            for key, hook in attributes[name].items()
        )

    def plain(self, value: Any, depth: int = 0) -> Hashable:
        """Returns a value to compare by: plain data and functions by their contents, anything else by which object it is."""
        if isinstance(value, _PLAIN):
            return type(value), value
        below = depth + 1
        if depth > _DEEP:
            return id(value)
        if isinstance(value, (tuple, list, set, frozenset, deque, *_DICTS)) and len(value) <= _LONG:
            if isinstance(value, dict):
                return type(value), tuple((self.plain(k, below), self.plain(v, below)) for k, v in value.items())
            parts = [self.plain(v, below) for v in value]
            return type(value), frozenset(parts) if isinstance(value, (set, frozenset)) else tuple(parts)
        if isinstance(value, nn.Module):
            return nn.Module, self.inside.get(id(value), id(value))
        if isinstance(value, Tensor):
            return Tensor, id(value) if id(value) in self.outside else self.tensors.get(id(value), id(value))
        return self._function(value, below)

    def _function(self, value: Any, below: int) -> Hashable:
        if isinstance(value, functools.partial):
            return type(value), self.plain((value.func, value.args, value.keywords), below)
        if isinstance(value, (MethodType, BuiltinFunctionType)):
            name = getattr(value, "__name__", "")  # a method may be made of a partial
            return type(value), name, self.plain(value.__self__, below), self.plain(getattr(value, "__func__", None), below)
        if type(value) is FunctionType:
            inner = tuple(_content(cell) for cell in value.__closure__ or ())
            parts = (value.__defaults__, value.__kwdefaults__, value.__dict__, inner)
            return FunctionType, value.__code__, id(value.__globals__), self.plain(parts, below)
        if _is_callable_object(value):
            return type(value), self.plain(value.__dict__, below)
        return id(value)


def _after(tensor: Tensor) -> Mapping[Any, Any]:
    return getattr(tensor, "_post_accumulate_grad_hooks", None) or {}


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def _is_callable_object(value: Any) -> bool:
    """True for an instance of a class in Python whose `__dict__` is all its state."""
    kind = type(value)
    plain = callable(value) and any(isinstance(k.__dict__.get("__call__"), FunctionType) for k in kind.__mro__)
    return (
        plain
        and isinstance(getattr(value, "__dict__", None), dict)
        and not isinstance(value, type)
        and not any("__slots__" in k.__dict__ for k in kind.__mro__)
    )


def _counters(blocks: Sequence[Mapping[Key, Hashable]]) -> set[Key]:
    """Returns the attributes that are the block's position wherever they are, in two blocks at least."""
    holders: dict[Key, int] = {}
    others: set[Key] = set()
    for position, attributes in enumerate(blocks):
        for key, value in attributes.items():
            if value == (int, position):
                holders[key] = holders.get(key, 0) + 1
            else:
                others.add(key)
    return {key for key, count in holders.items() if count > 1 and key not in others}


def alike_blocks(model: nn.Module) -> dict[str, str]:
    """Returns path of a block → path of the earlier block in the same container that it is alike to (templates are left out)."""
    found: dict[str, str] = {}
    holders = Holders(model)
    for path, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or len(container) < 2:
            continue
        if any((path + ".").startswith(block + ".") for block in found):
            continue
        blocks = [(f"{path}.{name}" if path else name, block) for name, block in container._modules.items() if block is not None]
        if any(not block._modules or holders.count[id(block)] > 1 or not _can_be_called(block) for _, block in blocks):
            continue  # leaves are cheap, shared blocks are not copies of each other, containers are not called themselves
        described = [_Describer(block, holders.outside(block)).describe() for _, block in blocks]
        counters = _counters([attributes for _, attributes in described])
        templates: dict[Hashable, str] = {}
        for (child, _), (tree, attributes) in zip(blocks, described, strict=True):
            signature = (tree, tuple((k, v) for k, v in attributes.items() if k not in counters))
            template = templates.setdefault(signature, child)
            if template != child:
                found[child] = template
    return found


def _can_be_called(block: nn.Module) -> bool:
    return type(block).forward is not nn.Module.forward or "forward" in block.__dict__


def counted(model: nn.Module, repeats: Mapping[str, str]) -> set[Key]:
    """Returns the int attributes (module path, name) of templates that are another number in a block alike to them."""
    found: set[Key] = set()
    modules = dict(model.named_modules())
    for block, template in repeats.items():
        for path, module in modules[template].named_modules():
            twin = modules[block].get_submodule(path).__dict__
            here = f"{template}.{path}" if path else template
            found |= {(here, k) for k, v in module.__dict__.items() if type(v) is int and k not in _SKIP and twin.get(k) != v}
    return found
