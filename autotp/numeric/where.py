"""Finds the first module whose numbers differ.

Values inside a sharded region may rightly differ from the whole ones. Over ranks r, a module's result v_r stands for the model's w
when all v_r = w, when Σ_r v_r = w, when v_r = 0 for all r (a partial sum that a later module adds), or when w's values are all
among the v_r.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from autotp.numeric.exact import relative_error
from autotp.trace.boundary import flatten_result

#: Results of module calls, (module path, number of the call, path in the result) → tensor, in the order in which the calls ended.
Order = dict[tuple[str, int, tuple[str | int, ...]], Tensor]
_MOST = 200_000  # entries of a result that is looked at


@contextmanager
def watched(model: nn.Module) -> Iterator[Order]:
    """Note the result of every module call inside."""
    order: Order = {}
    calls: dict[str, int] = {}

    def hook_of(path: str) -> Any:
        def hook(_module: nn.Module, _args: Any, result: Any) -> None:
            call = calls[path] = calls.get(path, -1) + 1
            flatten_result(result, lambda where, t: _note(order, (path, call, where), t))

        return hook

    handles = [m.register_forward_hook(hook_of(path)) for path, m in model.named_modules() if path]
    try:
        yield order
    finally:
        for handle in handles:
            handle.remove()


def _note(order: Order, key: tuple[str, int, tuple[str | int, ...]], t: Tensor) -> Tensor:
    if t.numel() <= _MOST and t.layout is torch.strided:
        order[key] = t.detach().clone()
    return t


def first_wrong_module(wanted: Order, ranks: Sequence[Order], wrong: Mapping[str, float], tolerance: float) -> tuple[str, bool]:
    """The path of the first module whose result stands for something else; else the one whose gradient is made first of the wrong ones.

    True where gradients showed it.

    `wrong`: paths of what differs (`gradient of NAME`).
    """
    for key, w in wanted.items():
        values = [order.get(key) for order in ranks]
        if any(v is None for v in values):
            return key[0], False
        if w.is_floating_point() and not _stands_for([v for v in values if v is not None], w, tolerance):
            return key[0], False
    last = {key[0]: at for at, key in enumerate(wanted)}
    modules = [path.removeprefix("gradient of ").rpartition(".")[0] for path in wrong if path.startswith("gradient of ")]
    return max(modules, key=lambda m: last.get(m, -1), default=""), bool(modules)


def _stands_for(values: list[Tensor], w: Tensor, tolerance: float) -> bool:
    if all(relative_error(v, w) <= tolerance for v in values):
        return True
    if any(v.dim() != w.dim() for v in values):
        return False
    if all(v.shape == w.shape for v in values):
        return not any(v.count_nonzero() for v in values) or relative_error(torch.stack(values).sum(0), w) <= tolerance
    if sum(v.numel() for v in values) != w.numel():
        return True  # copies or padding: nothing is claimed
    return relative_error(torch.cat([v.flatten() for v in values]).sort().values, w.flatten().sort().values) <= tolerance
