"""Which module differs first: outputs of all module calls of both models, compared in the order in which the calls end.

Values inside a region may rightly differ from the whole one. Over ranks r, a module output v_r stands for the reference w when

    R: v_r = w for all r        P: sum_r v_r = w        S: the v_r laid end to end hold the values of w, in some order
    H: v_r = 0 for all r, the partial sum is held back for a later module, where v_r = w + the w held back

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

from autotp.numeric.exact import TOLERANCE, relative_error
from autotp.rewrite.observer import Observer
from autotp.trace.boundary import flatten_result

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

    handles = [module.register_forward_hook(Observer(hook_of(path))) for path, module in model.named_modules()]
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
    HELD = "held"
    NOT = "not"


def first_difference(reference: Record, ranks: list[Record], tolerance: float = TOLERANCE) -> str:
    """Says which call differs first, or which call did not happen; "" where all agree."""
    found = first_module(reference, ranks, tolerance)
    return found[1] if found is not None else ""


def first_module(reference: Record, ranks: list[Record], tolerance: float = TOLERANCE) -> tuple[str, str] | None:
    """(path of the module, sentence) of the first call that differs, or that did not happen; None where all agree."""
    partial: list[str] = []
    held: dict[str, Tensor] = {}
    zeros: list[str] = []  # of `held`, those that are in no sum yet
    for key, wanted in reference.items():
        place = _place(key)
        locals_ = [record[key] for record in ranks if key in record]
        if len(locals_) < len(ranks):
            return key[0], f"{place} did not return on every rank"
        stands = stands_for(locals_, wanted, tolerance)
        if stands is Stands.NOT and any(_equal(locals_, wanted, more, tolerance) for more in held.values()):
            zeros.clear()
            continue
        match stands:
            case Stands.NOT:
                shapes = ", ".join(map(str, sorted({tuple(value.shape) for value in locals_})))
                error = max(relative_error(value, wanted) for value in locals_)
                before = f"; still partial sums before it: {', '.join(partial)}" if partial else ""
                before += f"; zeros before it: {', '.join(zeros)}" if zeros else ""
                return key[0], f"{place}: relative error {error:.1e}, shape {tuple(wanted.shape)}, on the ranks {shapes}{before}"
            case Stands.HELD:
                held[place] = wanted
                zeros.append(place)
            case Stands.PARTIAL:
                partial.append(place)
            case Stands.REPLICATED:
                partial.clear()
            case Stands.SHARDED:
                pass
    return None


def _equal(locals_: list[Tensor], wanted: Tensor, more: Tensor, tolerance: float) -> bool:
    """True where every rank has `wanted` and what was held back before it."""
    return more.shape == wanted.shape and all(relative_error(value, wanted + more) <= tolerance for value in locals_)


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
        if not any(value.count_nonzero() for value in locals_):
            return Stands.HELD
        return Stands.PARTIAL if relative_error(torch.stack(locals_).sum(0), wanted) <= tolerance else Stands.NOT
    if sum(value.numel() for value in locals_) != wanted.numel():
        return Stands.SHARDED
    together = torch.cat([value.flatten() for value in locals_]).sort().values
    return Stands.SHARDED if relative_error(together, wanted.flatten().sort().values) <= tolerance else Stands.NOT
