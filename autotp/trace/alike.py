"""Blocks that are alike, so that a trace costs the same at any depth.

Two children of a `ModuleList` or `Sequential` are alike when their trees have the same classes, parameter and buffer shapes
and plain attributes. An attribute that counts the blocks (equal to the child's position in every child that has it, as `layer_idx`
is in hybrids of two kinds of blocks) is left out of the comparison.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from torch import nn

_SKIP = frozenset(nn.Module().__dict__) - {"training"}
_PLAIN = (int, float, bool, str, type(None))
Key = tuple[str, str]


def _plain(value: Any, depth: int = 0) -> Hashable:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (tuple, list)) and depth < 3:
        return tuple(_plain(v, depth + 1) for v in value)
    if isinstance(value, nn.Module):
        return type(value)  # type: ignore[return-value]  # classes are hashable
    by_identity = hasattr(value, "__dict__") and not callable(value)
    return id(value) if by_identity else type(value)  # type: ignore[return-value]  # classes are hashable


def _describe(block: nn.Module) -> tuple[Hashable, dict[Key, Hashable]]:
    parts: list[Hashable] = []
    attributes: dict[Key, Hashable] = {}
    for path, module in block.named_modules():
        shapes = tuple(
            (k, None if t is None else (tuple(t.shape), t.dtype))
            for table in (module._parameters, module._buffers)
            for k, t in table.items()
        )
        parts.append((path, type(module), shapes))
        attributes.update({(path, k): _plain(v) for k, v in module.__dict__.items() if k not in _SKIP})
    return tuple(parts), attributes


def _counters(blocks: Sequence[Mapping[Key, Hashable]]) -> set[Key]:
    """Attributes that are the block's position wherever they are, in two blocks at least."""
    holders: dict[Key, int] = {}
    others: set[Key] = set()
    for position, attributes in enumerate(blocks):
        for key, value in attributes.items():
            if type(value) is int and value == position:
                holders[key] = holders.get(key, 0) + 1
            else:
                others.add(key)
    return {key for key, count in holders.items() if count > 1 and key not in others}


def alike_blocks(model: nn.Module) -> dict[str, str]:
    """Path of a block → path of the earlier block in the same container that it is alike to (templates are left out)."""
    found: dict[str, str] = {}
    owners: dict[int, int] = {}
    for _, parent in model.named_modules(remove_duplicate=False):
        for child in parent._modules.values():
            owners[id(child)] = owners.get(id(child), 0) + 1
    for path, container in model.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or len(container) < 2:
            continue
        if any((path + ".").startswith(block + ".") for block in found):
            continue
        blocks = [(f"{path}.{name}" if path else name, block) for name, block in container._modules.items() if block is not None]
        if any(not block._modules or owners[id(block)] > 1 for _, block in blocks):
            continue  # leaves are cheap, shared blocks are not copies of each other
        described = [_describe(block) for _, block in blocks]
        counters = _counters([attributes for _, attributes in described])
        templates: dict[Hashable, str] = {}
        for (child, _), (tree, attributes) in zip(blocks, described, strict=True):
            signature = (tree, tuple((k, v) for k, v in attributes.items() if k not in counters))
            template = templates.setdefault(signature, child)
            if template != child:
                found[child] = template
    return found
