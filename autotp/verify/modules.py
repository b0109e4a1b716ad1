"""Which module differs first: outputs of all module calls of both models, compared in the order in which the calls end.

Values inside a region may rightly differ from the whole one. Over ranks r, a module output v_r stands for the reference w when

    R: v_r = w for all r        P: sum_r v_r = w        S: the v_r laid end to end hold the values of w, in some order

and where a shard repeats parts (so no count fits) nothing is claimed. Only what fits none of these is a difference. A partial sum
that should have been reduced shows one module later; the message names those that were still partial just before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from autotp.trace.boundary import flatten_result
from autotp.verify.exact import TOLERANCE, relative_error

#: (module path, number of the call, path inside the result) → output.
Record = dict[tuple[str, int, tuple[str | int, ...]], Tensor]


@contextmanager
def recorded(model: nn.Module) -> Iterator[Record]:
    """Collect the outputs of all module calls made inside, in the order in which the calls end."""
    record: Record = {}
    calls: dict[str, int] = {}

    def hook_of(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, result: Any) -> None:
            call = calls[path] = calls.get(path, -1) + 1
            flatten_result(result, lambda where, tensor: record.setdefault((path, call, where), _plain(tensor)))

        return hook

    handles = [module.register_forward_hook(hook_of(path)) for path, module in model.named_modules()]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def _plain(tensor: Tensor) -> Tensor:
    from torch.distributed.tensor import DTensor

    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


class Stands(Enum):
    """As what the ranks' values may stand for the reference."""

    REPLICATED = "replicated"
    PARTIAL = "partial"
    SHARDED = "sharded"
    NOT = "not"


def first_difference(reference: Record, ranks: list[Record], tolerance: float = TOLERANCE) -> str:
    """Says which call differs first, or which call did not happen; "" where all agree."""
    partial: list[str] = []
    for key, wanted in reference.items():
        place = _place(key)
        locals_ = [record[key] for record in ranks if key in record]
        if len(locals_) < len(ranks):
            return f"{place} did not return on every rank"
        match stands_for(locals_, wanted, tolerance):
            case Stands.NOT:
                shapes = ", ".join(map(str, sorted({tuple(value.shape) for value in locals_})))
                error = max(relative_error(value, wanted) for value in locals_)
                before = f"; still partial sums before it: {', '.join(partial)}" if partial else ""
                return f"{place}: relative error {error:.1e}, shape {tuple(wanted.shape)}, on the ranks {shapes}{before}"
            case Stands.PARTIAL:
                partial.append(place)
            case Stands.REPLICATED:
                partial.clear()
            case Stands.SHARDED:
                pass
    return ""


def _place(key: tuple[str, int, tuple[str | int, ...]]) -> str:
    path, call, where = key
    return f"{path or '<root>'}{f' (call {call})' if call else ''}{f', output {list(where)}' if where else ''}"


def stands_for(locals_: list[Tensor], wanted: Tensor, tolerance: float = TOLERANCE) -> Stands:
    """As what the ranks' values may be `wanted` (see the module docstring); SHARDED also where nothing can be said."""
    if all(relative_error(value, wanted) <= tolerance for value in locals_):
        return Stands.REPLICATED
    if not wanted.is_floating_point():
        return Stands.SHARDED
    if any(value.dim() != wanted.dim() for value in locals_):
        return Stands.NOT
    if all(value.shape == wanted.shape for value in locals_):
        return Stands.PARTIAL if relative_error(torch.stack(locals_).sum(0), wanted) <= tolerance else Stands.NOT
    if sum(value.numel() for value in locals_) != wanted.numel():
        return Stands.SHARDED
    together = torch.cat([value.flatten() for value in locals_]).sort().values
    return Stands.SHARDED if relative_error(together, wanted.flatten().sort().values) <= tolerance else Stands.NOT
